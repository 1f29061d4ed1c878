"""Summaries of a text.

{"document": "The council met on Monday. It …", "summary": "The council met.", "summaries": ["A council met."]}
"""

import re
from collections.abc import Sequence

from jaxtune.metrics import language, summarisation
from jaxtune.metrics.base import Scores, mean
from jaxtune.tasks.base import Options, Row, Task, as_list, wanted


def _ask(row: Row, options: Options) -> str:
    return f"Summarise the text.\n{row['document']}\nSummary:\n"


def reference(row: Row) -> list[str] | None:
    """The summary and the further ones, each once."""
    texts = [row.get("summary"), *(row.get("summaries") or ())]
    return list(dict.fromkeys(t for t in texts if t is not None)) or None


def score(predictions: Sequence[str], references: Sequence[str | list[str]], options: Options) -> Scores:
    """ROUGE; of several references the best counts."""
    return summarisation.score([p.strip() for p in predictions], references, options.language)


def lead(rows: Sequence[Row], references: Sequence[str | list[str]], options: Options) -> tuple[str, Scores]:
    """The text's first sentences, as many as reach the mean length of a reference."""
    length = mean([float(len(language.words(t))) for r in references for t in as_list(r)])
    return "the first sentences", score([_first(row["document"], length) for row in rows], references, options)


def _first(text: str, words: float) -> str:
    taken = ""
    for sentence in re.split(r"(?<=[.!?])(?=\s)|(?<=[。！？\n])", text):
        taken += sentence
        if len(language.words(taken)) >= words:
            break
    return taken.strip()


TASK = Task(
    name="summarisation",
    format="summarisation",
    ask=_ask,
    answer=lambda row, origin: wanted(row, "summary", origin),
    reference=reference,
    score=score,
    metric="rougeL",
    max_new_tokens=128,
    baseline=lead,
)
