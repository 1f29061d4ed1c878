"""Text to tokens in processes of their own.

Each is a fresh Python that reads from a pipe: jax, which does not survive a fork, is not in it, the caller's main
module is not run again, and it ends when the pipe closes, however the caller came to its end. What goes through the
pipes is pickled; it goes between our own processes only.
"""

import contextlib
import itertools
import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxtune.data.encode import Encoding
from jaxtune.data.examples import Example
from jaxtune.errors import UserError

WORTH = 8000  # examples below which processes take longer to start than they save
_CHUNK = 200  # examples that go to a process at a time


def number(asked: int | None, n_examples: int) -> int:
    """How many processes to take for so many examples; none is this process.

    >>> number(None, 100), number(3, 100)
    (0, 3)
    """
    if asked is not None:
        return asked
    return 0 if n_examples < WORTH or (os.cpu_count() or 1) == 1 else min(8, os.cpu_count() or 1)


class Pool:
    """Encodes examples in `n` processes, in order; in this one where `n` is 0. They start when they are first needed.

    An error of an example is raised as it would be here; a second example's does not come first.
    """

    def __init__(self, encoded: Callable[[Example], Encoding], n: int) -> None:
        self._encoded, self._n = encoded, n
        self._processes: list[subprocess.Popen] = []
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, examples: Sequence[Example]) -> list[Encoding]:
        if not self._n:
            return [self._encoded(e) for e in examples]
        if not self._processes:
            self._start()
        chunks = [examples[i : i + _CHUNK] for i in range(0, len(examples), _CHUNK)]
        threads = ThreadPoolExecutor(self._n)
        try:
            return list(itertools.chain.from_iterable(threads.map(self._ask, chunks)))
        except BaseException:
            self.close()  # else the threads would wait for their answers
            raise
        finally:
            threads.shutdown(cancel_futures=True)

    def close(self) -> None:
        """End the processes."""
        for p in self._processes:
            p.kill()
        for p in self._processes:
            p.wait()
            for pipe in (p.stdin, p.stdout):
                with contextlib.suppress(OSError):  # what was on its way
                    pipe.close()  # type: ignore[union-attr]
        self._processes, self._idle = [], queue.SimpleQueue()

    def _start(self) -> None:
        encoded = pickle.dumps(self._encoded)
        places = os.pathsep.join(p or os.getcwd() for p in sys.path)
        for _ in range(self._n):
            process = subprocess.Popen(  # noqa: S603 our own module
                [sys.executable, "-P", "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": places, "TOKENIZERS_PARALLELISM": "false"},
            )
            self._processes.append(process)

        def tell(process: subprocess.Popen) -> None:
            with contextlib.suppress(BrokenPipeError):  # found when it is asked
                process.stdin.write(encoded)  # type: ignore[union-attr]
            self._idle.put(process)

        with ThreadPoolExecutor(self._n) as threads:  # each begins to read when it has started
            list(threads.map(tell, self._processes))

    def _ask(self, chunk: Sequence[Example]) -> list[Encoding]:
        idle = self._idle
        process = idle.get()
        try:
            pickle.dump(chunk, process.stdin)  # type: ignore[arg-type]
            process.stdin.flush()  # type: ignore[union-attr]
            answer = pickle.load(process.stdout)  # type: ignore[arg-type]  # noqa: S301
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as e:
            raise UserError(
                f"data.workers: a process that makes tokens ended (exit code {process.poll()}); if memory is short, "
                "take fewer, or data.workers=0"
            ) from e
        finally:
            idle.put(process)
        if isinstance(answer, UserError):
            raise answer
        if isinstance(answer, str):
            raise RuntimeError(f"in a process that makes tokens:\n{answer}")
        return answer


def serve(source: Any, out: Any) -> None:
    """Answer what comes until the pipe closes: first how to encode, then lists of examples."""
    encoded = pickle.load(source)  # noqa: S301
    while True:
        try:
            examples = pickle.load(source)  # noqa: S301
        except (EOFError, pickle.UnpicklingError):  # the caller is gone
            return
        answer: Any
        try:
            answer = [encoded(e) for e in examples]
        except UserError as e:
            answer = e
        except Exception:  # a fault of ours, told where it happened
            answer = traceback.format_exc()
        pickle.dump(answer, out)
        out.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who closes the pipe
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else goes into the pipe
    with contextlib.suppress(BrokenPipeError):
        serve(sys.stdin.buffer, answers)
