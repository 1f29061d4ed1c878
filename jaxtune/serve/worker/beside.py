"""A worker that a service starts beside its API, in a process of its own: started again when it dies, ended with it.

Its settings come through its standard input, which a password may pass and a command line may not; when that closes,
the service is gone, however it went, and the worker saves and leaves.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from jaxtune import log
from jaxtune.serve.settings import Settings

_FIRST_S, _LONGEST_S = 1.0, 60.0  # between a death and the next start
_SAVING_S = 600.0  # that a save may take
_NICER = 5  # training leaves the processor to requests where both want it
_COMMAND = (sys.executable, "-P", "-m", "jaxtune", "worker", "--beside")  # no module of the working directory


class Beside:
    """Watches over the worker."""

    def __init__(self, settings: Settings, command: Sequence[str] = _COMMAND) -> None:
        self._settings, self._command = settings, command
        self._leaving = threading.Event()
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._watch, name="worker", daemon=True)

    def start(self) -> None:
        """Start it, and keep it alive."""
        self._thread.start()

    def leave(self) -> None:
        """Tell it to save and end; returns at once."""
        self._leaving.set()
        with self._lock:
            if self._child is not None and self._child.poll() is None:
                self._child.send_signal(signal.SIGTERM)

    def join(self) -> None:
        """Wait until it has ended; an interrupt, or too long a wait, kills it. Its job goes on from what was saved."""
        self.leave()
        if not self._thread.ident:
            return
        try:
            self._thread.join(_SAVING_S)
        finally:
            if self._child is not None and self._child.poll() is None:
                self._child.kill()
                self._child.wait()

    def _watch(self) -> None:
        wait = _FIRST_S
        while not self._leaving.is_set():
            began = time.monotonic()
            with self._lock:
                if self._leaving.is_set():
                    return
                # a session of its own: the terminal's Ctrl-C is for the service, which then says what to do
                self._child = subprocess.Popen(  # noqa: S603  (ourselves)
                    self._command, stdin=subprocess.PIPE, text=True, start_new_session=True,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
                )  # fmt: skip
            _tell(self._child, self._settings)
            code = self._child.wait()
            if self._child.stdin is not None:
                self._child.stdin.close()
            if self._leaving.is_set():
                return
            wait = _FIRST_S if time.monotonic() - began > _LONGEST_S else min(2 * wait, _LONGEST_S)
            log.warn(f"the worker ended with {code}; it is started again, and takes up what it left")
            self._leaving.wait(wait)


def _tell(child: "subprocess.Popen[str]", settings: Settings) -> None:
    """The settings; a child that is dead already is seen by its exit code."""
    if child.stdin is not None:
        try:
            child.stdin.write(settings.model_dump_json() + "\n")
            child.stdin.flush()
        except BrokenPipeError:
            return


def work(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT; a job that runs is saved then and goes back to the queue."""
    _work(settings, threading.Event())


def work_beside() -> None:
    """Work as the settings of the first line of standard input say, until it closes."""
    settings, stop = Settings.model_validate_json(sys.stdin.readline()), threading.Event()
    os.nice(_NICER)

    def wait_for_the_end() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        stop.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    _work(settings, stop)


def _work(settings: Settings, stop: threading.Event) -> None:
    from jaxtune.serve.worker import worker

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    worker.run(settings, stop)
