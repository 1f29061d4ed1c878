"""Tasks by name, one file each: how a row becomes a conversation, and how answers become scores."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtune.config import Data
from jaxtune.data.examples import RECORDS, AsConversation, Conversation, Example, Record
from jaxtune.errors import UserError, nearest
from jaxtune.tasks import choice, classification, dialogue, maths, qa, summarisation, translation
from jaxtune.tasks.base import Options, Row, Task

__all__ = ["TASKS", "Options", "Question", "Task", "asking", "named", "options_of", "questions"]

TASKS: Mapping[str, Task] = {
    m.TASK.name: m.TASK for m in (classification, qa, translation, summarisation, dialogue, maths, choice)
}
_ALSO = dict.fromkeys(("sentiment", "topic", "spam", "intent"), "classification")
_OF_FORMAT = {t.format: t for t in TASKS.values() if t.format is not None}


class Question(NamedTuple):
    """What a model is asked, and what it should answer."""

    conversation: Conversation
    reference: Any
    row: Row  # {} of a conversation
    origin: str


def named(name: str) -> Task:
    """A task.

    Raises:
      UserError: there is none of this name.
    """
    name = _ALSO.get(name, name)
    if name not in TASKS:
        raise UserError(f"task {name!r} does not exist{nearest(name, list(TASKS))}")
    return TASKS[name]


def options_of(data: Data, language: str | None = None) -> Options:
    """How a config's data section asks; `language` is that of the answers, which a target column may name."""
    codes = {s.columns.get("target") for s in data.sources}
    if len(codes & {*translation.LANGUAGES}) > 1 and data.prompt is None:
        raise UserError(
            "data.train: its sets are translated into several languages, and each row should say into which; set "
            "data.prompt with a column that names it, such as 'Translate into {language}: {source}'"
        )
    code = codes.pop() if len(codes) == 1 else None
    language = language or (code if code in translation.LANGUAGES else None)
    return Options(data.prompt, tuple(data.labels), language, data.train_on)


def asking(data: Data) -> AsConversation:
    """How rows of tasks become the conversations that a language model is trained on.

    Raises (when called):
      UserError: rows of this kind need a head of their own.
    """
    options = options_of(data)

    def ask(record: Record) -> Conversation:
        if record.task not in _OF_FORMAT:
            raise UserError(
                f"{record.origin}: rows of format {record.task} are not answered in words; set "
                f"objective={record.task}, which trains a head for them"
            )
        return _OF_FORMAT[record.task].conversation(record, options)

    return ask


def asked(example: Example, options: Options) -> Example:
    """A row of a task as a conversation, which ends with its answer where the row has one; others as they are."""
    if not isinstance(example, Record) or example.task not in _OF_FORMAT:
        return example
    answered = all(example.row.get(c) is not None for c in RECORDS[example.task].answers)
    return _OF_FORMAT[example.task].conversation(example, options, answered)


def questions(task: Task, examples: Sequence[Example], options: Options) -> list[Question]:
    """What to ask a model of some examples: rows of the task, or conversations, whose answers are then references.

    Raises:
      UserError: an example is of another kind or has no answer to score against.
    """
    out: list[Question] = []
    for e in examples:
        if isinstance(e, Record) and e.task == task.format:
            reference = task.reference(e.row)
            if reference is None:
                raise UserError(f"{e.origin}: the row has no answer to score against; add it, or leave the row out")
            out.append(Question(task.conversation(e, options, answered=False), reference, e.row, e.origin))
        elif isinstance(e, Conversation) and task.decides != "choices":
            out += _of_turns(e, last=task.format is not None or options.train_on == "last")
        else:
            kind = f"of format {e.task}" if isinstance(e, Record) else f"a {type(e).__name__.lower()}"
            raise UserError(
                f"{e.origin}: the row is {kind}, which task {task.name} cannot ask; set "
                f"format={task.format or 'messages'} and map its columns, or take another task"
            )
    return out


def _of_turns(c: Conversation, last: bool) -> list[Question]:
    """The assistant's turns, each as an answer to what stands before it."""
    turns = [i for i, m in enumerate(c.messages) if m.role == "assistant" and i]
    if not turns:
        raise UserError(f"{c.origin}: has no assistant turn to score against; leave the row out")
    return [
        Question(c._replace(messages=c.messages[:i]), c.messages[i].content, {}, c.origin)
        for i in (turns[-1:] if last else turns)
    ]
