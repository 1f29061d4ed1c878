"""Routes: chat."""

import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field, StringConstraints, model_validator
from starlette.responses import Response

from jaxtune.serve.api import asking, tool_calls
from jaxtune.serve.api.asking import Answers, Asked
from jaxtune.serve.api.errors import ApiError
from jaxtune.serve.api.service import By, Here
from jaxtune.serve.bodies import Body
from jaxtune.serve.inference.asks import Piece, Word
from jaxtune.serve.store import ids

router = APIRouter()

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Part(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Called(Body):
    """Which function was called, and how."""

    name: str
    arguments: str
    """JSON."""

    def seen(self) -> dict[str, Any]:
        """As templates expect it, and as a model is trained: arguments are an object, where they are one."""
        try:
            value = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            value = None
        return {"name": self.name, "arguments": value if isinstance(value, dict) else self.arguments}


class ToolCall(Body):
    """A call in an earlier message."""

    id: str
    type: Literal["function"] = "function"
    function: Called


class ChatMessage(Body):
    """A turn of the conversation."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    """Not used, as the following: clients send back messages as they got them."""
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    def seen(self) -> dict[str, Any]:
        """As the engine takes it."""
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or [])
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        extra = {
            "name": self.name, "tool_call_id": self.tool_call_id, "reasoning_content": self.reasoning_content,
            "tool_calls": [{"id": c.id, "type": c.type, "function": c.function.seen()} for c in self.tool_calls or []]
            or None,
        }  # fmt: skip
        return {"role": role, "content": content, **{k: v for k, v in extra.items() if v is not None}}


class Function(Body):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""
    strict: bool | None = None


class Tool(Body):
    """A tool."""

    type: Literal["function"]
    function: Function


class ChatRequest(Asked):
    """A conversation to go on with. Fields of the original API that are not listed are refused."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    """The older name of `max_completion_tokens`."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    """`{"type": "text"}` alone."""
    modalities: list[str] | None = None
    """`["text"]` alone."""
    audio: dict[str, Any] | None = None
    """Refused, as the following."""
    web_search_options: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    """Not used, as the following."""
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    verbosity: str | None = None
    reasoning_effort: str | None = None

    @model_validator(mode="after")
    def _together(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    def check(self) -> None:
        """Raises: ApiError: something is asked for that there is not here."""
        for name, asked in (
            ("response_format", (self.response_format or {}).get("type", "text") != "text"),
            ("modalities", self.modalities not in (None, ["text"])),
            ("tool_choice", self.tool_choice not in (None, "none", "auto")),
            ("audio", self.audio is not None),
            ("web_search_options", self.web_search_options is not None),
            ("prediction", self.prediction is not None),
            ("functions", bool(self.functions)),
            ("function_call", self.function_call not in (None, "none", "auto")),
        ):
            if asked:
                message = f"Unsupported parameter: '{name}' is not supported with these values by this service."
                raise ApiError(400, message, name, "unsupported_parameter")

    @property
    def called(self) -> list[Tool]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else list(self.tools or [])


@router.post("/v1/chat/completions", response_model=None)
async def create(body: ChatRequest, request: Request, here: Here, by: By) -> Response:
    """The next message of a conversation, whole or as a stream of `data:` events."""
    body.check()
    place = await asking.place_of(here, by, body.model)
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    ask = body.asked(place, here.settings.limits, body.n or 1, most, logprobs)
    ask.messages, ask.tools, ask.specials = (
        [m.seen() for m in body.messages], [t.model_dump(exclude_none=True) for t in body.called], bool(body.called),
    )  # fmt: skip
    head = {
        "id": ids.new("chatcmpl-"), "object": "chat.completion", "created": int(time.time()), "model": body.model,
        "system_fingerprint": place.fingerprint, "service_tier": "default",
    }  # fmt: skip
    if body.stream:
        answers = await Answers.begin(here, by, ask)
        head["object"] = "chat.completion.chunk"
        return asking.streamed(request, answers, lambda pieces: _chunks(pieces, answers, body, head))

    async def whole() -> dict[str, Any]:
        answers = await Answers.begin(here, by, ask)
        choices = [_choice(pieces, body) for pieces in await answers.whole()]
        return {**head, "choices": choices, "usage": answers.usage}

    return JSONResponse(await asking.while_connected(request, whole()))


def _choice(pieces: list[Piece], body: ChatRequest) -> dict[str, Any]:
    text, finish = "".join(p.text for p in pieces), pieces[-1].finish
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
    if body.called:
        content, calls = _calls(text, body)
        if calls:
            message |= {"content": content or None, "tool_calls": [c.told() for c in calls]}
            finish = "tool_calls"
    words = [w for p in pieces for w in p.words or []]
    return {
        "index": pieces[0].index, "message": message, "finish_reason": finish,
        "logprobs": _logprobs(words) if body.logprobs else None,
    }  # fmt: skip


def _calls(text: str, body: ChatRequest) -> tuple[str, list[tool_calls.Call]]:
    content, calls = tool_calls.split(text, {t.function.name for t in body.called})
    return content, calls[:1] if body.parallel_tool_calls is False else calls


def _logprobs(words: list[Word]) -> dict[str, Any]:
    def one(text: str, raw: list[int], logprob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": raw}

    content = [{**one(w.text, w.bytes, w.logprob), "top_logprobs": [one(*t) for t in w.top]} for w in words]
    return {"content": content, "refusal": None}


async def _chunks(
    pieces: AsyncIterator[Piece], answers: Answers, body: ChatRequest, head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """The pieces of a stream as its chunks. Text that may be a call of a tool waits until it is known."""
    usage = {"usage": None} if body.counts else {}
    texts, told = [""] * answers.ask.n, [0] * answers.ask.n

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, words: Any = None) -> dict[str, Any]:
        logprobs = _logprobs(words) if body.logprobs and words else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**head, "choices": [choice], **usage}

    for i in range(answers.ask.n):
        yield chunk(i, {"role": "assistant", "content": "", "refusal": None})
    async for piece in pieces:
        i, finish = piece.index, piece.finish
        texts[i] += piece.text
        sure = tool_calls.begins(texts[i]) if body.called and finish is None else len(texts[i])
        calls: list[tool_calls.Call] = []
        if body.called and finish is not None:
            content, calls = _calls(texts[i], body)
            sure = len(content) if calls else sure
        new, told[i] = texts[i][told[i] : sure], max(told[i], sure)
        if new or piece.words:
            yield chunk(i, {"content": new}, words=piece.words)
        if calls:
            yield chunk(i, {"tool_calls": [c.told(at) for at, c in enumerate(calls)]})
        if finish is not None:
            yield chunk(i, {}, "tool_calls" if calls else finish)
    if body.counts:
        yield {**head, "choices": [], "usage": answers.usage}
