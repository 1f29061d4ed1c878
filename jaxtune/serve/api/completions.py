"""Routes: completions, the older way to ask: a text goes on."""

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field, model_validator
from starlette.responses import Response

from jaxtune.serve.api import asking
from jaxtune.serve.api.asking import Answers, Asked
from jaxtune.serve.api.errors import ApiError
from jaxtune.serve.api.service import By, Here
from jaxtune.serve.inference.asks import Piece, Word
from jaxtune.serve.store import ids

router = APIRouter()
_DEFAULT = 16  # tokens

Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class CompletionRequest(Asked):
    """A text, or several, to go on with."""

    prompt: str | Ids | Annotated[list[Ids], Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] = ""
    """A text or its token ids, or several of either."""
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)
    suffix: str | None = None
    """Refused."""

    @model_validator(mode="after")
    def _together(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError("best_of must be at least n")
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise ValueError("best_of and stream do not go together")
        return self

    @property
    def prompts(self) -> list[Any]:
        """Always several."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


@router.post("/v1/completions", response_model=None)
async def create(body: CompletionRequest, request: Request, here: Here, by: By) -> Response:
    """What texts go on with, whole or as a stream of `data:` events."""
    if body.suffix:
        message = "Unsupported parameter: 'suffix' is not supported by this service."
        raise ApiError(400, message, "suffix", "unsupported_parameter")
    limits, prompts = here.settings.limits, body.prompts
    if max(len(prompts), body.best_of or 1) > limits.answers:
        name = "prompt" if len(prompts) > limits.answers else "best_of"
        raise ApiError(400, f"Invalid value for '{name}': at most {limits.answers} here.", name, "invalid_value")
    place = await asking.place_of(here, by, body.model)
    most = _DEFAULT if body.max_tokens is None else body.max_tokens
    ask = body.asked(place, limits, body.best_of or body.n or 1, most, body.logprobs)
    ask.prompts, ask.echo = prompts, bool(body.echo)
    head = {
        "id": ids.new("cmpl-"), "object": "text_completion", "created": int(time.time()), "model": body.model,
        "system_fingerprint": place.fingerprint,
    }  # fmt: skip
    if body.stream:
        answers = await Answers.begin(here, by, ask)
        return asking.streamed(request, answers, lambda pieces: _chunks(pieces, answers, body, head))

    async def whole() -> dict[str, Any]:
        answers = await Answers.begin(here, by, ask)
        texts = await answers.whole()
        kept = [t for i in range(len(prompts)) for t in _best(texts[i * ask.n : (i + 1) * ask.n], body.n or 1)]
        return {**head, "choices": [_choice(i, pieces) for i, pieces in enumerate(kept)], "usage": answers.usage}

    return JSONResponse(await asking.while_connected(request, whole()))


def _best(texts: list[list[Piece]], n: int) -> list[list[Piece]]:
    """Those with the highest log-probability per token."""
    if n == len(texts):
        return texts
    return sorted(texts, key=lambda t: -t[-1].score / max(t[-1].tokens, 1))[:n]


def _choice(index: int, pieces: list[Piece]) -> dict[str, Any]:
    words = None if pieces[0].words is None else [w for p in pieces for w in p.words or []]
    text = "".join(p.text for p in pieces)
    logprobs = None if words is None else _logprobs(words)
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": pieces[-1].finish}


def _logprobs(words: list[Word]) -> dict[str, Any]:
    return {
        "tokens": [w.text for w in words],
        "token_logprobs": [w.logprob for w in words],
        "top_logprobs": [
            None if w.logprob is None else {**{text: p for text, _, p in w.top}, w.text: w.logprob} for w in words
        ],
        "text_offset": [w.at for w in words],
    }


async def _chunks(
    pieces: AsyncIterator[Piece], answers: Answers, body: CompletionRequest, head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    usage = {"usage": None} if body.counts else {}
    async for piece in pieces:
        yield {**head, "choices": [_choice(piece.index, [piece])], **usage}
    if body.counts:
        yield {**head, "choices": [], "usage": answers.usage}
