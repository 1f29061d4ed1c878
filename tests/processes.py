"""Processes of their own for scripts: those of one run, joined through a port of the loopback, or one of many devices.

They are forked from a server that has imported what runs need, which takes longer than most of the scripts, and that
has touched no device.
"""

import atexit
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tools.faults import IMPORTS

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(list(IMPORTS))

TRAIN = """
import json, sys
from pathlib import Path
from jaxtune import cli, run
from tests.tiny import make_config
model, data, out = (Path(a) for a in sys.argv[1:4])
with cli.exit_codes():
    run.train(make_config(model, data, out, **json.loads(sys.argv[4])))
"""


class Done(NamedTuple):
    """How a process ended."""

    code: int
    stdout: str
    stderr: str


class Forked:
    """A process that runs a script, in the ways of `subprocess.Popen`."""

    def __init__(self, script: str, args: tuple[object, ...], env: dict[str, str]) -> None:
        self._said = tempfile.TemporaryDirectory()
        given = (script, [str(a) for a in args], {**os.environ, **env}, self._said.name)
        self._process = _FORKS.Process(target=_main, args=given)
        self._process.start()
        self.pid: int = self._process.pid  # type: ignore[assignment]

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end. What it said on stdout and stderr."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("script", timeout, self._read("2"))
        said = self._read("1"), self._read("2")
        self.wait()
        return said

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.join()
        self._said.cleanup()

    def _read(self, name: str) -> str:
        file = Path(self._said.name, name)
        return file.read_text(errors="replace") if file.exists() else ""


def _main(script: str, args: list[str], env: dict[str, str], said: str) -> None:
    os.environ.clear()
    os.environ.update(env)
    for fd in (1, 2):
        os.dup2(os.open(f"{said}/{fd}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    sys.argv = ["-c", *args]
    try:
        exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def start(script: str, count: int, devices: int, *args: object, **env: str) -> list[Forked]:
    """Start `count` processes of a script, each with so many devices."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    told = {"XLA_FLAGS": flags}
    if count > 1:
        told |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    return [Forked(script, args, {**told, "JAX_PROCESS_ID": str(i), **env}) for i in range(count)]


def ended(processes: list[Forked], timeout: float = 600) -> list[Done]:
    """Wait for processes; none stays behind."""
    done = []
    try:
        for p in processes:
            out, err = p.communicate(timeout=timeout)
            done.append(Done(p.returncode, out, err))
    finally:
        for p in processes:
            p.kill()
            p.wait()
    return done


def together(script: str, count: int, devices: int, *args: object, **env: str) -> list[Done]:
    """Run `count` processes of a script to their good end."""
    done = ended(start(script, count, devices, *args, **env))
    assert all(d.code == 0 for d in done), "\n---\n".join(d.stderr[-3000:] for d in done)
    return done


def on_eight_devices(script: str, *args: object) -> Done:
    """A script run to its good end in a process that sees eight devices, its compiler set as ours is."""
    return together(script, 1, 8, *args)[0]
