"""Programs that the API starts for an answer: one of a kind at a time, under a time limit, answers kept for a while."""

import asyncio
import contextlib
import os
from collections import Counter, OrderedDict, defaultdict
from collections.abc import AsyncIterator, Hashable, Sequence
from typing import Annotated

from fastapi import Depends, Request

from jaxtune.serve.api.errors import ApiError

_WAITING = 4  # requests that wait for a turn of one kind; the next is told to come again
_KEPT = 64  # answers
_BYTES = 2**22  # of an answer that is kept
_PASSED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "XDG_CACHE_HOME", "HF_HOME")


class Failed(Exception):
    """A program ended with an error; its text is what it said last."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(said)
        self.refused = code == 2  # it said in one line what the user can put right


class Turns:
    """Who may start a program now, and what programs answered."""

    def __init__(self) -> None:
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._waiting: Counter[str] = Counter()
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()

    @contextlib.asynccontextmanager
    async def turn(self, kind: str) -> AsyncIterator[None]:
        """Wait until no other of this kind is under way. Raises: ApiError: too many wait already."""
        if self._waiting[kind] >= _WAITING:
            raise ApiError(
                429, f"others wait for a {kind} already; come again", code="rate_limit_exceeded", type="requests",
                headers={"Retry-After": "5"},
            )  # fmt: skip
        self._waiting[kind] += 1
        try:
            async with self._locks[kind]:
                yield
        finally:
            self._waiting[kind] -= 1

    async def ask(self, kind: str, key: Hashable, arguments: Sequence[str], given: bytes, seconds: float) -> bytes:
        """What a program writes; an answer to the same question is kept.

        Args:
          kind: of which one runs at a time.
          key: names the question.
          arguments: the program.
          given: its standard input.
          seconds: after which it is ended.

        Raises:
          ApiError: too many wait, or it took too long.
          Failed: it ended with an error.
        """
        async with self.turn(kind):
            if (kind, key) in self._kept:
                self._kept.move_to_end((kind, key))
                return self._kept[kind, key]
            out = await run(kind, arguments, given, seconds)
            if len(out) <= _BYTES:
                self._kept[kind, key] = out
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return out

    def forget(self, file_id: str) -> None:
        """Keep no answers about a file; their keys are tuples that begin with its id."""
        for kept in [
            k for k in list(self._kept) if isinstance(k, tuple) and isinstance(k[1], tuple) and k[1][0] == file_id
        ]:
            del self._kept[kept]


def turns_of(request: Request) -> Turns:
    """The turns of the application that a request came to."""
    state = request.app.state
    if not hasattr(state, "turns"):
        state.turns = Turns()
    return state.turns


Taking = Annotated[Turns, Depends(turns_of)]


async def run(kind: str, arguments: Sequence[str], given: bytes, seconds: float) -> bytes:
    """What a program writes. Raises: ApiError: it took too long. Failed: it ended with an error."""
    process = await asyncio.create_subprocess_exec(
        *arguments, env=_environment(), start_new_session=True,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        out, errors = await asyncio.wait_for(process.communicate(given), seconds)
    except TimeoutError as e:
        raise ApiError(400, f"the {kind} took more than {seconds:.0f} s; try with a smaller file or model") from e
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            await process.wait()
    if process.returncode:
        said = errors.decode(errors="replace").strip().splitlines()
        raise Failed(process.returncode, said[-1] if said else f"it ended with {process.returncode}")
    return out


def _environment() -> dict[str, str]:
    """What such a program needs of ours: no keys, no addresses of databases. Chips are left to those who train."""
    kept = {k: v for k, v in os.environ.items() if k in _PASSED}
    return {**kept, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
