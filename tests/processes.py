"""Several processes of one run on this machine, each with devices of its own, joined through a port of the loopback."""

import os
import socket
import subprocess
import sys
from typing import NamedTuple

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


def start(script: str, count: int, devices: int, *args: object, **env: str) -> list[subprocess.Popen[str]]:
    """Start `count` processes of a script, each with so many devices."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    told = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count), "XLA_FLAGS": flags}
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, args)],
            env={**os.environ, **told, "JAX_PROCESS_ID": str(i), **env},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(count)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen[str]], timeout: float = 600) -> list[Done]:
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
