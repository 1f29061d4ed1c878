"""ROUGE-1, -2, -L and -Lsum (Lin, 2004) by rouge-score: F-measures between 0 and 1, without stemming."""

from collections.abc import Sequence

from jaxtune.errors import UserError
from jaxtune.metrics import language as languages
from jaxtune.metrics.base import Scores, mean

NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class _Characters:
    """A tokenizer of rouge-score for languages without spaces; its own drops all but Latin letters."""

    def tokenize(self, text: str) -> list[str]:
        return languages.words(text)


def score(predictions: Sequence[str], references: Sequence[str | Sequence[str]], language: str | None = None) -> Scores:
    """Means over the rows; of several references the best counts. ROUGE-Lsum takes lines for sentences.

    Args:
      language: seen from the references where not given. rouge-score's own tokenizer knows Latin letters and digits
        alone, so Chinese, Japanese and Korean go by character, and so does all else that is asked for by name.

    Raises:
      UserError: there is nothing to score.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if not references:
        raise UserError("summarisation: there are no rows to score; give data with at least one")
    several = [[r] if isinstance(r, str) else list(r) for r in references]
    found = languages.of((t for texts in several for t in texts), language)
    own = found in ("zh", "ja", "ko", "th")
    scorer = RougeScorer(list(NAMES), use_stemmer=False, tokenizer=_Characters() if own else None)
    rows: dict[str, list[float]] = {name: [] for name in NAMES}
    for prediction, texts in zip(predictions, several, strict=True):
        best = scorer.score_multi(texts, prediction)
        for name in NAMES:
            rows[name].append(float(best[name].fmeasure))
    details = {"language": found, "tokenizer": "characters" if own else "rouge-score", "stemmer": False}
    return Scores({name: mean(rows[name]) for name in NAMES}, details, rows)
