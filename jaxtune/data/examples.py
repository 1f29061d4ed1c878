"""What a row of a data file becomes, whatever format it came in. Each value knows where it stood (`file:line`)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


class Message(NamedTuple):
    """One turn."""

    role: str  # system, user, assistant or tool; "developer" is read as system
    content: str
    trained: bool = True  # of an assistant's turn: whether there is loss on it
    extra: Mapping[str, Any] = {}  # what a template sees beside: tool_calls, reasoning_content, name, tool_call_id

    def seen(self) -> dict[str, Any]:
        """As a chat template sees it."""
        return {"role": self.role, "content": self.content, **self.extra}


class Conversation(NamedTuple):
    """Turns of a conversation, and the format that they came in (which suggests a template)."""

    messages: tuple[Message, ...]
    format: str
    origin: str
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas of functions, as OpenAI writes them


class Document(NamedTuple):
    """Plain text, trained on throughout."""

    text: str
    origin: str


class Segments(NamedTuple):
    """Text in pieces, each with whether it is trained on; no template."""

    parts: tuple[tuple[str, bool], ...]
    origin: str


class Tokens(NamedTuple):
    """Token ids as they are, and which of them are trained on."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]
    origin: str


class Pair(NamedTuple):
    """A prompt with a preferred and a rejected answer."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    format: str
    origin: str
    tools: tuple[Mapping[str, Any], ...] = ()


class Judged(NamedTuple):
    """A conversation that was found good or bad (KTO)."""

    conversation: Conversation
    good: bool
    origin: str


class Record(NamedTuple):
    """A row of a named task, its columns under the task's own names (see `RECORDS`)."""

    row: Mapping[str, Any]
    task: str
    origin: str


Example = Conversation | Document | Segments | Tokens | Pair | Judged | Record
AsConversation = Callable[[Record], Conversation]  # how a task asks its question


class Columns(NamedTuple):
    """Columns of a task's rows: those that it needs, those that hold the answer, and those that may be there."""

    needed: tuple[str, ...]
    answers: tuple[str, ...]  # may be missing where nothing is to be trained or scored
    optional: tuple[str, ...] = ()


# One entry a task. Values are checked and brought into these forms when a row is read:
RECORDS: Mapping[str, Columns] = {
    # label: str, or a list of str (several labels). Numbers are turned into str.  text_pair: a second text
    "classification": Columns(("text",), ("label",), ("text_pair",)),
    # label: float
    "regression": Columns(("text",), ("label",), ("text_pair",)),
    # SQuAD: answers {"text": [str], "answer_start": [int]}, both empty where there is no answer.  id: str
    "qa": Columns(("context", "question"), ("answers",), ("id",)),
    # str, and str or [str] (references; the first is trained on); or translation {"en": str, "de": str}, mapped by
    # data.columns {source: en, target: de}
    "translation": Columns(("source",), ("target",)),
    # summary: str.  summaries: [str], further references
    "summarisation": Columns(("document",), ("summary",), ("summaries",)),
    # GSM8K: the answer ends in "#### 42"
    "maths": Columns(("question",), ("answer",)),
    # tokens [str] and tags [str] of equal length (IOB2); or text str and spans [{start, end, label}] in characters
    "token_classification": Columns((), (), ("tokens", "tags", "text", "spans")),
    # choices: [str].  answer: int, which of them is right
    "choice": Columns(("question", "choices"), ("answer",)),
}


def strings(value: Any) -> Iterator[str]:
    """The texts of an example, or of a value in one.

    >>> list(strings(Record({"text": "Hi", "label": ["a"]}, "classification", "f:1")))
    ['Hi', 'a']
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, Record):
        yield from strings(list(value.row.values()))
    elif isinstance(value, Conversation):
        yield from (m.content for m in value.messages)
    elif isinstance(value, Document):
        yield value.text
    elif isinstance(value, Segments):
        yield from (text for text, _ in value.parts)
    elif isinstance(value, Mapping):
        yield from strings(list(value.values()))
    elif isinstance(value, list):
        for x in value:
            yield from strings(x)
