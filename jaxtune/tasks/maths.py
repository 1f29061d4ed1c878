"""Word problems whose solution ends in a number, as in GSM8K.

{"question": "Ella has 3 bags of 4 apples. How many?", "answer": "3 * 4 = <<3*4=12>>12 apples.\\n#### 12"}
"""

from collections.abc import Sequence

from jaxtune.metrics import maths
from jaxtune.metrics.base import Scores
from jaxtune.tasks.base import Options, Row, Task, wanted


def _ask(row: Row, options: Options) -> str:
    return f"{row['question']}\nSolve it step by step and end with #### and the number.\nSolution:\n"


def score(predictions: Sequence[str], references: Sequence[str], options: Options) -> Scores:
    """Exact match of the number after ####, or of the last number (flexible)."""
    del options
    return maths.score(predictions, references)


def commonest(rows: Sequence[Row], references: Sequence[str], options: Options) -> tuple[str, Scores]:
    """The number that is right most often."""
    del rows
    numbers = [str(maths.answer(r)) for r in references]
    most = max(sorted(set(numbers)), key=numbers.count)
    return f"always {most}", score([f"#### {most}"] * len(references), references, options)


TASK = Task(
    name="maths",
    format="maths",
    ask=_ask,
    answer=lambda row, origin: wanted(row, "answer", origin),
    reference=lambda row: row.get("answer"),
    score=score,
    metric="exact_match",
    max_new_tokens=320,
    baseline=commonest,
)
