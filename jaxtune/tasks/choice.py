"""Multiple choice: which of some answers is the likeliest.

    {"question": "The sky is", "choices": ["blue", "green", "a kind of soup"], "answer": 0}

The choices stand one at a time in the place of the answer; the question does not list them. Their likelihood is taken
as a whole, per character and per token, as in lm_eval.
"""

from collections.abc import Sequence

from jaxtune.metrics import choice
from jaxtune.metrics.base import Scores, mean
from jaxtune.metrics.choice import Choice
from jaxtune.tasks.base import Options, Row, Task, wanted


def _ask(row: Row, options: Options) -> str:
    return f"Question: {row['question']}\nAnswer:\n"


def score(predictions: Sequence[Sequence[Choice]], references: Sequence[int], options: Options) -> Scores:
    """Accuracies."""
    del options
    return choice.score(predictions, references)


def chance(rows: Sequence[Row], references: Sequence[int], options: Options) -> tuple[str, Scores]:
    """What drawing among the choices gives on average."""
    del references, options
    value = mean([1 / len(row["choices"]) for row in rows])
    return "chance", Scores({"acc": value, "acc_norm": value, "acc_token": value})


TASK = Task(
    name="choice",
    format="choice",
    ask=_ask,
    answer=lambda row, origin: row["choices"][wanted(row, "answer", origin)],
    reference=lambda row: row.get("answer"),
    score=score,
    metric="acc",
    max_new_tokens=1,
    decides="choices",
    baseline=chance,
)
