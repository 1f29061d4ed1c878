"""Questions about a text, answered by generation.

    {"context": "Normandy was given to Rollo in 911.", "question": "When was Normandy given?",
     "answers": {"text": ["911", "in 911"], "answer_start": [31, 28]}}

A question without an answer (SQuAD v2) is answered with "unanswerable", which scores as the empty answer.
"""

from collections.abc import Sequence

from jaxtune.metrics import language, squad
from jaxtune.metrics.base import Scores
from jaxtune.tasks.base import Options, Row, Task, as_list, wanted

NONE = "unanswerable"


def _ask(row: Row, options: Options) -> str:
    return f"Answer the question with words of the text.\n{row['context']}\nQuestion: {row['question']}\nAnswer:\n"


def _answer(row: Row, origin: str) -> str:
    return next(iter(wanted(row, "answers", origin)["text"]), NONE)


def score(predictions: Sequence[str], references: Sequence[str | list[str]], options: Options) -> Scores:
    """Exact match and F1; Chinese by character."""
    several = [as_list(r) for r in references]
    spoken = language.of((text for texts in several for text in texts), options.language)
    said = {str(i): "" if p.strip().rstrip(".").lower() == NONE else p.strip() for i, p in enumerate(predictions)}
    return squad.score(said, {str(i): [t for t in r if t != NONE] for i, r in enumerate(several)}, spoken)


def copy(rows: Sequence[Row], references: Sequence[str | list[str]], options: Options) -> tuple[str, Scores]:
    """The whole context."""
    return "the context, copied", score([row["context"] for row in rows], references, options)


TASK = Task(
    name="qa",
    format="qa",
    ask=_ask,
    answer=_answer,
    reference=lambda row: None if row.get("answers") is None else list(row["answers"]["text"]),
    score=score,
    metric="f1",
    max_new_tokens=48,
    baseline=copy,
)
