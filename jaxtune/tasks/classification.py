"""One label, or several, for a text (or two): sentiment, topic, intent, spam.

    {"text": "the best film of the year", "label": "positive"}
    {"text": "A man sleeps.", "text_pair": "He is awake.", "label": "contradiction"}
    {"text": "rain and wind", "label": ["weather", "nature"]}

One label is chosen among the names by likelihood, its end included, so the answer is always a label and names that
begin with one another are told apart. Several labels are generated, with commas between.
"""

from collections import Counter
from collections.abc import Sequence

from jaxtune.errors import UserError
from jaxtune.metrics import classification
from jaxtune.metrics.base import Scores
from jaxtune.tasks.base import Options, Row, Task, wanted


def _ask(row: Row, options: Options) -> str:
    listed = f"\nLabels: {', '.join(options.labels)}" if options.labels else ""
    second = f"\nSecond text: {row['text_pair']}" if row.get("text_pair") else ""
    return f"Which label fits?{listed}\nText: {row['text']}{second}\nLabel:\n"


def _answer(row: Row, origin: str) -> str:
    label = wanted(row, "label", origin)
    if not isinstance(label, str) and any("," in name for name in label):
        raise UserError(f"{origin}: a label with a comma in it cannot stand in a list of labels; rename it")
    return label if isinstance(label, str) else ", ".join(label)


def score(predictions: Sequence[str], references: Sequence[str | list[str]], options: Options) -> Scores:
    """Of one label each; of sets of them where any reference is a list."""
    labels = options.labels or names(references)
    if all(isinstance(r, str) for r in references):
        return classification.score(predictions, [str(r) for r in references], labels)
    return classification.score_multilabel([_set(p) for p in predictions], [_set(r) for r in references], labels)


def names(references: Sequence[str | list[str]]) -> tuple[str, ...]:
    """All labels of some rows, sorted.

    >>> names(["b", ["c", "a"]])
    ('a', 'b', 'c')
    """
    return tuple(sorted({name for r in references for name in ([r] if isinstance(r, str) else r)}))


def majority(rows: Sequence[Row], references: Sequence[str | list[str]], options: Options) -> tuple[str, Scores]:
    """Always the label, or the set of labels, that is the most frequent here."""
    del rows
    kinds = Counter(r if isinstance(r, str) else ", ".join(sorted(r)) for r in references)
    most = kinds.most_common(1)[0][0]
    return f"always {most!r}", score([most] * len(references), references, options)


def _set(labels: str | list[str]) -> set[str]:
    parts = labels.split(",") if isinstance(labels, str) else labels
    return {name.strip() for name in parts if name.strip()}


TASK = Task(
    name="classification",
    format="classification",
    ask=_ask,
    answer=_answer,
    reference=lambda row: row.get("label"),
    score=score,
    metric="accuracy",
    max_new_tokens=64,
    decides="labels",
    baseline=majority,
)
