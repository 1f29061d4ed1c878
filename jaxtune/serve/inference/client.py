"""The API's side of the inference process: asks it for texts, and starts it again where it died."""

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

from jaxtune.serve.inference.asks import LINE_BYTES, Ask, Failure, Piece, piece_of
from jaxtune.serve.settings import Settings

_log = logging.getLogger(__name__)
_START_S = 120.0  # for the process to begin
_QUIET_S = 600.0  # between two replies; the first may wait for a model to be read
_STOP_S = 5.0
_DIED = "the inference process ended while it answered; ask again"


class Engine:
    """Asks the inference process for texts; it starts with the first question, and again after it died."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.running: asyncio.subprocess.Process | None = None
        self._starting: asyncio.Lock | None = None
        self._reading: asyncio.Task | None = None
        self._ids = itertools.count(1)
        self._replies: dict[int, asyncio.Queue] = {}
        self._taken: collections.Counter[str | None] = collections.Counter()  # answers under way, by key
        self._closed = False

    async def start(self) -> None:
        """Be ready for questions of this event loop. The process itself starts with the first."""
        self._starting, self._closed = asyncio.Lock(), False

    async def stop(self) -> None:
        """End the process."""
        self._closed = True
        if (process := self.running) is not None:
            assert process.stdin is not None
            process.stdin.close()  # it ends with its input
            try:
                await asyncio.wait_for(process.wait(), _STOP_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        if self._reading is not None:
            await self._reading

    async def generate(self, ask: Ask, key: str | None = None) -> AsyncGenerator[list[int] | Piece]:
        """How many tokens each prompt has, then the texts piece by piece. Closing the iterator ends the work.

        Args:
          ask: what is wanted.
          key: whose answers these count as.

        Raises:
          Failure: there can be no text, or no more of it: too many are made (429), the prompt does not fit (400), the
            process died (500).
        """
        prompts = len(ask.prompts) if ask.prompts is not None else 1
        with self._place(prompts * ask.n, key):
            async with contextlib.aclosing(self._asked({"op": "generate", **dataclasses.asdict(ask)})) as replies:
                async for reply in replies:
                    if "tokens" in reply:
                        yield reply["tokens"]
                    for piece in reply.get("pieces", ()):
                        yield piece_of(piece)

    async def count(self, ask: Ask) -> list[int]:
        """How many tokens each prompt has. Raises: Failure: as `generate`."""
        async with contextlib.aclosing(self._asked({"op": "count", **dataclasses.asdict(ask)})) as replies:
            return (await anext(replies))["tokens"]

    async def forget(self, folder: Path) -> None:
        """Let go of a model that was deleted, if it is held."""
        if self.running is not None:
            self._write({"id": next(self._ids), "op": "forget", "folder": str(folder)})

    @contextlib.contextmanager
    def _place(self, answers: int, key: str | None) -> Iterator[None]:
        limits = self.settings.limits
        for limit, taken, whose in (
            (limits.streams, self._taken.total(), "this service makes"),
            (limits.key_streams, self._taken[key], "this key may have"),
        ):
            if taken + answers > limit:
                raise Failure(
                    429, f"more answers than {whose} at a time ({limit}); wait for others to end", "too_many_answers"
                )
        self._taken[key] += answers
        try:
            yield
        finally:
            self._taken[key] -= answers

    async def _asked(self, question: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        await self._running()
        id = next(self._ids)
        queue: asyncio.Queue = asyncio.Queue()
        self._replies[id] = queue
        over = True  # until there is something to cancel
        try:
            self._write({"id": id, **question})
            over = False
            while not over:
                try:
                    reply = await asyncio.wait_for(queue.get(), _QUIET_S)
                except TimeoutError as e:
                    raise Failure(503, "the inference process does not answer; try again later", "timeout") from e
                over = "error" in reply or "done" in reply
                if "error" in reply:
                    raise Failure(**reply["error"])
                yield reply
        finally:
            del self._replies[id]
            if not over:
                self._write({"id": id, "op": "cancel"})

    def _write(self, line: dict[str, Any]) -> None:
        data = json.dumps(line).encode() + b"\n"
        if len(data) > LINE_BYTES:
            raise Failure(413, "the request is too long to be answered", "request_too_large")
        if self.running is not None and self.running.stdin is not None and not self.running.stdin.is_closing():
            self.running.stdin.write(data)

    async def _running(self) -> None:
        assert self._starting is not None, "Engine.start comes first"
        async with self._starting:
            if self._closed:
                raise Failure(503, "the service is ending")
            if self.running is not None:
                return
            self.running = process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "jaxtune.serve.inference", str(self.settings.cache_bytes), str(os.getpid()),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=LINE_BYTES,
                env=_environment(self.settings),
            )  # fmt: skip
            begun = asyncio.Event()
            self._reading = asyncio.create_task(self._read(process, begun))
            waiting = asyncio.create_task(begun.wait())
            await asyncio.wait({waiting, self._reading}, timeout=_START_S, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if not begun.is_set():
                if self._reading.done() is False:
                    process.kill()
                raise Failure(503, "the inference process does not start; the service's log says why")

    async def _read(self, process: asyncio.subprocess.Process, begun: asyncio.Event) -> None:
        """Hand replies to who waits for them, until the process ends."""
        assert process.stdout is not None
        while line := await process.stdout.readline():
            reply = json.loads(line)
            if "ready" in reply:
                begun.set()
            elif (queue := self._replies.get(reply.pop("id"))) is not None:
                queue.put_nowait(reply)
        code = await process.wait()
        self.running = None
        if not self._closed:
            _log.error("the inference process ended (exit %s); the next question starts it again", code)
        for queue in self._replies.values():
            queue.put_nowait({"error": Failure(500, _DIED, "inference_died").told()})


def _environment(s: Settings) -> dict[str, str]:
    """That of the inference process: the platform, and memory of a GPU taken as it is needed."""
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    if s.chat_platform:
        env["JAX_PLATFORMS"] = s.chat_platform
    elif "JAX_PLATFORMS" not in env and _tpus():
        env["JAX_PLATFORMS"] = "cpu"
        _log.warning("answers are made on the CPU, as a worker needs the TPU; chat_platform=tpu gives it to answers")
    return env


def _tpus() -> bool:
    """Whether the chips here are TPUs, without opening them."""
    return any(Path("/dev").glob("accel[0-9]*")) or Path("/dev/vfio/0").exists()
