"""What the API and the inference process say to each other: JSON, one object a line.

To the process: `{"id", "op": "generate", …Ask}`, `{"id", "op": "count", …Ask}`, `{"id", "op": "cancel"}`,
`{"id", "op": "forget", "folder"}`. From it, with the id of what was asked: `{"tokens"}` (of each prompt), then
`{"pieces": […Piece]}` as they come, then `{"done": true}`; or `{"error": {…Failure}}`. `{"ready": true}` comes first.
"""

import dataclasses
from typing import Any

LINE_BYTES = 2**26  # of one line, either way


@dataclasses.dataclass
class Ask:
    """A request for texts. Either `messages` or `prompts` are given."""

    base: str  # folder of the base model, or of a whole tuned one
    adapter: str | None = None  # folder
    messages: list[dict[str, Any]] | None = None  # role, content and what else a chat template sees
    tools: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    prompts: list[Any] | None = None  # texts, or lists of token ids
    n: int = 1  # texts of each prompt
    max_tokens: int | None = None  # None: what the context leaves, and `most` at most
    most: int = 4096
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = dataclasses.field(default_factory=dict)  # token id -> what is added
    stop: list[str] = dataclasses.field(default_factory=list)
    seed: int = 0
    logprobs: int | None = None  # None: not wanted; else of so many of the likeliest tokens too
    echo: bool = False  # the prompt is a part of the text
    specials: bool = False  # control tokens are a part of the text, where tool calls are written with them


@dataclasses.dataclass(frozen=True)
class Word:
    """One token of a text."""

    text: str
    bytes: list[int]
    logprob: float | None  # of the model alone; None: nothing came before it
    top: list[tuple[str, list[int], float]]  # the likeliest tokens here: text, bytes, log-probability
    at: int  # the character of the text at which it begins


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a text goes on with."""

    index: int  # prompt by prompt, `n` each
    text: str
    words: list[Word] | None = None  # where log-probabilities are wanted
    finish: str | None = None  # "stop" or "length", in the last piece
    tokens: int = 0  # of the whole text, in the last piece
    score: float = 0.0  # sum of their log-probabilities, in the last piece

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


class Failure(Exception):
    """Why there is no text, as an API says it."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {"status": self.status, "message": self.message, "code": self.code, "param": self.param}


def piece_of(told: dict[str, Any]) -> Piece:
    """A piece out of JSON."""
    words = told.get("words")
    return Piece(**{**told, "words": None if words is None else [Word(**w) for w in words]})
