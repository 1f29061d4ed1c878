"""What a task is: how a row is asked, what answer is wanted, and how answers are scored."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtune.data.examples import Conversation, Message, Record
from jaxtune.data.prompts import fill
from jaxtune.errors import UserError
from jaxtune.metrics.base import Scores

Row = Mapping[str, Any]


class Options(NamedTuple):
    """What a config says about how tasks ask and score."""

    prompt: str | None = None  # with columns in braces; the task's own where None
    labels: tuple[str, ...] = ()  # listed in the prompt where there are any
    language: str | None = None  # of the answers: "de"; seen from the references where None
    train_on: str = "assistant"  # which turns of a dialogue are answered: all, or the "last"


class Task(NamedTuple):
    """A named task. Each value of this type stands at the end of its file."""

    name: str
    format: str | None  # of `data.examples.RECORDS`; None for conversations
    ask: Callable[[Row, Options], str]  # the question as a user's message
    answer: Callable[[Row, str], str]  # what to train on; the origin is for messages
    reference: Callable[[Row], Any]  # what is scored against
    score: Callable[[Sequence[Any], Sequence[Any], Options], Scores]
    metric: str  # which score counts
    max_new_tokens: int
    decides: str = "text"  # or "labels", "choices": the likeliest of those
    baseline: Callable[[Sequence[Row], Sequence[Any], Options], tuple[str, Scores]] | None = None

    def conversation(self, record: Record, options: Options, answered: bool = True) -> Conversation:
        """A record as a conversation, with its answer to be trained on or without."""
        messages = [Message("user", self.question(record, options))]
        if answered:
            messages.append(Message("assistant", self.answer(record.row, record.origin)))
        return Conversation(tuple(messages), "prompt_completion", record.origin)

    def question(self, record: Record, options: Options) -> str:
        """The text of the question: the config's, else the task's own."""
        if options.prompt is None:
            return self.ask(record.row, options)
        labels = {"labels": ", ".join(options.labels)} if options.labels else {}
        return fill(options.prompt, {**record.row, **labels}, record.origin)


def wanted(row: Row, column: str, origin: str) -> Any:
    """A column that holds the answer.

    Raises:
      UserError: the row has none.
    """
    if row.get(column) is None:
        raise UserError(f"{origin}: no {column!r} to train on or to score against; add it, or leave the row out")
    return row[column]


def as_list(value: Any) -> list[str]:
    """One reference or several."""
    return [value] if isinstance(value, str) else list(value)
