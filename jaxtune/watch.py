"""Processes of a run watch over each other: where one is lost, hung or has failed, the others say so and end.

JAX alone would have them wait in a collective operation, or abort without a word. Signs of life, and the reasons of
failures, go through the coordinator's key-value store.
"""

import contextlib
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax

from jaxtune.distributed import TURNS, members, seconds, store
from jaxtune.errors import Interrupted

RESUME_ME = 75  # EX_TEMPFAIL of sysexits.h: run the same command again
_LOST_S = 60.0
_STEP_S, _STEPS = 60.0, 20  # a step is hung after so many seconds, or so many times the usual
_FIRST_STEP_S = 600.0  # hosts read weights at different speeds


class Watch:
    """Ends this process with code 75, and says which host is to blame, when another is lost, hung or has failed.

    Every process writes signs of life: a beat, and the number of steps that it has begun. A process whose beat stands
    still is lost. Where a step that this process has begun is not done in time, those that have begun fewer are hung,
    unless they still compile it.
    """

    def __init__(self) -> None:
        self._lost_after = seconds("JAXTUNE_LOST_AFTER", _LOST_S)
        self._step_limit = seconds("JAXTUNE_STEP_TIMEOUT", 0.0)
        self._lock = threading.Lock()
        (self._me, self._count), self._key = members(), f"jaxtune/{next(TURNS)}"
        self._begun, self._since, self._report, self._pending = 0, 0.0, None, False
        self._preparing = False
        self._times: deque[float] = deque(maxlen=_STEPS)
        self._closed = threading.Event()
        self._life: dict[int, Any] = {}
        self._asked = time.monotonic()
        others = (i for i in range(self._count) if i != self._me)
        self._beats = dict.fromkeys(others, (0, self._asked))  # the last beat of each, and when it was new
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._speak, self._look)]

    def over(self, step: Callable[..., Any], prepare: Callable[..., Any] = lambda *args: None) -> Callable[..., Any]:
        """A training step that is watched: until its report is there it is not done.

        `prepare` is called before it and may take its time, as compiling does: the step has then not begun.
        """

        def watched(*args: Any) -> Any:
            self._preparing = True
            prepare(*args)
            now = time.monotonic()
            if self._begun:
                self._times.append(now - self._since)
            with self._lock:
                self._begun, self._since, self._report, self._pending = self._begun + 1, now, None, True
            self._preparing = False
            state, report = step(*args)
            self._report = report["loss"]
            return state, report

        return watched

    def _settle(self) -> None:
        """Look whether the last step is done."""
        with self._lock:
            if self._report is not None and self._report.is_ready():
                self._pending = False

    def start(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # no coordinator: `_look` sees how long
            self._write()
        for t in self._threads:
            t.start()

    def stop(self, failure: str | None = None) -> None:
        """This process ends: all is done, or why not."""
        self._closed.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator is no more
            self._write(done=True, failure=failure)

    def _write(self, **more: Any) -> None:
        beat = time.monotonic_ns()
        life = {"beat": beat, "begun": self._begun, "preparing": self._preparing, "host": socket.gethostname(), **more}
        store().key_value_set(f"{self._key}/life/{self._me}", json.dumps(life), allow_overwrite=True)

    def _speak(self) -> None:
        while not self._closed.wait(self._lost_after / 10):
            try:
                self._write()
                lives = dict(store().key_value_dir_get(f"{self._key}/life"))
            except jax.errors.JaxRuntimeError:  # the coordinator does not answer: `_look` sees how long
                continue
            self._life = {int(k.rsplit("/", 1)[-1]): json.loads(v) for k, v in lives.items()}
            self._asked = time.monotonic()

    def _look(self) -> None:
        while not self._closed.wait(self._lost_after / 10):
            if (blame := self._to_blame()) is not None and not self._closed.is_set():
                print(f"stopped: {blame}; run the same command again on all hosts", file=sys.stderr, flush=True)
                self.stop(blame)
                self.leave(RESUME_ME)  # the main thread may wait for the lost one for ever

    def leave(self, code: int) -> NoReturn:
        """End this process at once: at JAX's own end all wait for each other, and not all will come.

        The coordinator ends last, or the others could not say why they end; it waits for those that live.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            store().key_value_set(f"{self._key}/left/{self._me}", "")
            began = time.monotonic()
            living = {i for i, (_, since) in self._beats.items() if began - since < self._lost_after}
            while self._me == 0 and living and time.monotonic() - began < self._lost_after:
                time.sleep(0.1)
                living -= {int(k.rsplit("/", 1)[-1]) for k, _ in store().key_value_dir_get(f"{self._key}/left")}
        os._exit(code)

    def _to_blame(self) -> str | None:
        """Who is lost, hung or has failed, in words."""
        now = time.monotonic()
        if now - self._asked > self._lost_after:
            return f"process 0, the coordinator, has not answered for {now - self._asked:.0f} s"
        lives = {i: life for i, life in self._life.items() if i != self._me}
        for i, (beat, since) in list(self._beats.items()):
            life = lives.get(i, {"beat": beat, "host": "a host that never spoke"})
            who = f"process {i} on {life['host']}"
            if life["beat"] != beat:
                self._beats[i] = life["beat"], (since := now)
            quiet = now - since
            if life.get("failure") and quiet > self._lost_after / 5:  # time for this one to fail by itself
                return f"{who} has failed: {life['failure']}"
            if not life.get("done") and quiet > self._lost_after:
                return f"{who} is lost: no sign of life for {quiet:.0f} s"
        self._settle()
        if any(life["preparing"] and life["begun"] < self._begun for life in lives.values()):
            self._since = now  # it compiles: the step waits for it, and the time for it begins anew
        if not self._pending or (waited := now - self._since) < self._limit():
            return None
        behind = [i for i, life in lives.items() if life["begun"] < self._begun and not life.get("done")]
        names = ", ".join(f"process {i} on {lives[i]['host']}" for i in behind)
        if not names:
            return f"a step is not done after {waited:.0f} s, though all processes have begun it; a device may hang"
        return f"a step is not done after {waited:.0f} s: {names} has not begun it"

    def _limit(self) -> float:
        """Seconds until a step counts as hung."""
        usual = max(_STEP_S, _STEPS * statistics.median(self._times)) if self._times else _FIRST_STEP_S
        return self._step_limit or usual

    def join(self) -> None:
        """Wait for the verdict on a failure that is likely another's."""
        self._threads[1].join(2 * self._lost_after)


_open: Watch | None = None
_failed: Watch | None = None


@contextlib.contextmanager
def watching() -> Iterator[Callable[..., Callable[..., Any]]]:
    """While open, processes watch over each other; gives what makes a training step a watched one (`Watch.over`).

    An error in one ends the others, and `leave` ends that one. A failure of a collective operation waits until it is
    known who is lost. Within another such context it is that one.
    """
    global _open, _failed
    if _open is not None or members()[1] == 1:
        yield _open.over if _open is not None else lambda step, prepare=None: step
        return
    watch, _failed = Watch(), None
    _open = watch
    watch.start()
    try:
        yield watch.over
    except Interrupted:  # in all of them, at the same step
        watch.stop()
        raise
    except BaseException as e:
        if isinstance(e, jax.errors.JaxRuntimeError):
            watch.join()
        _failed = watch
        watch.stop(" ".join(str(e).split())[:300] or type(e).__name__)
        raise
    finally:
        _open = None
    watch.stop()


def failed() -> bool:
    """Whether there are other processes, and an error ended `watching`, which they may not share."""
    return _failed is not None


def leave(code: int) -> NoReturn:
    """End this process with a code, after such an error."""
    assert _failed is not None
    _failed.leave(code)
