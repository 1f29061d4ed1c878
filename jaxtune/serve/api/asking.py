"""What chat and completions share: fields, which folders a model is, the engine's answers whole or as a stream."""

import asyncio
import contextlib
import hashlib
import json
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, NamedTuple, TypeVar

from fastapi import Request
from pydantic import Field, StringConstraints, model_validator
from sse_starlette import EventSourceResponse
from starlette.concurrency import run_in_threadpool

import jaxtune
from jaxtune.serve import bases
from jaxtune.serve.api import errors, models
from jaxtune.serve.api.errors import ApiError
from jaxtune.serve.api.service import Caller, Service
from jaxtune.serve.bodies import Body
from jaxtune.serve.inference.asks import Ask, Failure, Piece
from jaxtune.serve.settings import Limits

_log = logging.getLogger("jaxtune.serve")
_GREEDY = 1e-4  # temperatures below are 0
_PING_S = 15
_T = TypeVar("_T")

Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]


class StreamOptions(Body):
    """How a stream is told."""

    include_usage: bool | None = None
    """Whether the last chunk counts tokens."""
    include_obfuscation: bool | None = None
    """Not used."""


class Asked(Body):
    """What may be asked of any text."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    """A base model, or a tuned one by its name."""
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    user: str | None = None
    """Not used."""

    @model_validator(mode="after")
    def _streams(self) -> "Asked":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true alone")
        return self

    @property
    def counts(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def asked(self, place: "Place", limits: Limits, n: int, max_tokens: int | None, logprobs: int | None) -> Ask:
        """The question to the engine, without its prompt.

        Raises:
          ApiError: a number is beyond the service's limits.
        """
        for name, value, most in (("n", n, limits.answers), ("max_tokens", max_tokens, limits.answer_tokens)):
            if value is not None and value > most:
                raise ApiError(400, f"Invalid value for '{name}': at most {most} here.", name, "invalid_value")
        temperature = 1.0 if self.temperature is None else self.temperature
        return Ask(
            base=place.base,
            adapter=place.adapter,
            n=n,
            max_tokens=max_tokens,
            most=limits.answer_tokens,
            temperature=0.0 if temperature < _GREEDY else temperature,
            top_p=1.0 if self.top_p is None else max(self.top_p, 1e-6),  # the likeliest always counts
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=dict(self.logit_bias or {}),
            stop=[self.stop] if isinstance(self.stop, str) else list(self.stop or []),
            seed=secrets.randbits(31) if self.seed is None else self.seed % 2**32,
            logprobs=logprobs,
        )


class Place(NamedTuple):
    """The folders of a model."""

    base: str
    adapter: str | None

    @property
    def fingerprint(self) -> str:
        """Changes with what makes the answers."""
        text = json.dumps([jaxtune.__version__, *self])
        return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:10]


async def place_of(here: Service, by: Caller, name: str) -> Place:
    """Where a model lies. Raises: ApiError: the caller has none of this name."""

    def find() -> Place:
        there = bases.found(here.settings)
        if name in there:
            return Place(str(there[name].absolute()), None)
        with here.database.read() as session:
            if (row := models.tuned_of(session, by, name)) is None:
                raise models.unknown(name)
            # an adapter may lie on a whole model that was tuned here
            under = None if row.base in there else models.tuned_of(session, by, row.base)
        folder = str(here.storage.model(row))
        if row.kind == "whole":
            return Place(folder, None)
        if row.base in there:
            return Place(str(there[row.base].absolute()), folder)
        if under is None or under.kind != "whole":
            message = f"The base model of `{name}`, `{row.base}`, is not there any more."
            raise ApiError(404, message, "model", "model_not_found")
        return Place(str(here.storage.model(under)), folder)

    return await run_in_threadpool(find)


class Answers:
    """The engine's answers to a question, begun: what can be refused has been by now."""

    def __init__(self, replies: AsyncGenerator[Any], prompts: list[int], ask: Ask) -> None:
        self._replies, self.prompts, self.ask = replies, prompts, ask
        self.ended: dict[int, Piece] = {}  # the last piece of each

    @classmethod
    async def begin(cls, here: Service, by: Caller, ask: Ask) -> "Answers":
        """Ask. Raises: ApiError: there can be no answer."""
        replies = here.engine.generate(ask, by.key_id)
        try:
            prompts = await anext(replies)
        except Failure as e:
            raise told(e) from e
        assert isinstance(prompts, list)  # it begins with the tokens of each prompt
        return cls(replies, prompts, ask)

    async def pieces(self) -> AsyncGenerator[Piece]:
        """What comes. Raises: ApiError: no more can come."""
        async with contextlib.aclosing(self._replies):
            try:
                async for piece in self._replies:
                    if piece.finish is not None:
                        self.ended[piece.index] = piece
                    yield piece
            except Failure as e:
                raise told(e) from e

    async def whole(self) -> list[list[Piece]]:
        """All pieces of each text."""
        texts: dict[int, list[Piece]] = {}
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                texts.setdefault(piece.index, []).append(piece)
        return [texts[i] for i in sorted(texts)]

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens so far, of all texts that were made."""
        read, made = sum(self.prompts), sum(p.tokens for p in self.ended.values())
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def told(e: Failure) -> ApiError:
    """A failure of the engine as the API says it."""
    headers = {"Retry-After": "2"} if e.status in (429, 503) else {}
    kind = {400: "invalid_request_error", 429: "requests"}.get(e.status, "server_error")
    return ApiError(e.status, e.message, e.param, e.code, kind, headers)


async def while_connected(request: Request, work: Awaitable[_T]) -> _T:
    """The work's result; it is cancelled when the client goes away. Raises: ApiError: it went, so nobody reads this."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "The client closed the connection.")
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def streamed(
    request: Request, answers: Answers, chunks: Callable[[AsyncIterator[Piece]], AsyncIterator[dict[str, Any]]]
) -> EventSourceResponse:
    """A stream of the chunks that pieces become. Where it breaks, an error is its last event."""

    async def events() -> AsyncGenerator[dict[str, str]]:
        try:
            async with contextlib.aclosing(answers.pieces()) as pieces:
                async for chunk in chunks(pieces):
                    yield {"data": json.dumps(chunk)}
            yield {"data": "[DONE]"}
        except ApiError as e:
            yield {"data": json.dumps(e.envelope())}
        except Exception:  # a stream that is merely cut would look like one that has ended
            _log.exception("%s: a stream of answers", request.state.request_id)
            yield {"data": json.dumps(errors.internal().envelope())}

    return EventSourceResponse(events(), ping=_PING_S, headers={"Cache-Control": "no-cache"})
