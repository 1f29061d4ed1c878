"""Conversations: every assistant turn, or the last (`data.train_on`), is answered and measured.

    {"messages": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello, how are you?"}, …]}

The score that counts is perplexity, which comes from the loss on the same turns, not from the answers.
"""

from collections.abc import Sequence
from typing import Any

from jaxtune.metrics import dialogue
from jaxtune.metrics.base import Scores
from jaxtune.tasks.base import Options, Row, Task


def _no_row(row: Row, _: Any) -> str:
    raise TypeError("a dialogue has turns, not columns")


def score(predictions: Sequence[str], references: Sequence[str], options: Options) -> Scores:
    """Distinct n-grams and length, beside those of the references."""
    del options
    found = dialogue.score(predictions)
    return found._replace(details={**found.details, "references": dict(dialogue.score(references).values)})


TASK = Task(
    name="dialogue",
    format=None,
    ask=_no_row,
    answer=_no_row,
    reference=lambda row: None,
    score=score,
    metric="perplexity",
    max_new_tokens=128,
)
