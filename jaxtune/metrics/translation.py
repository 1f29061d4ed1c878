"""BLEU (Papineni et al., 2002), chrF (Popović, 2015) and TER (Snover et al., 2006) by sacrebleu, with signatures."""

from collections.abc import Sequence
from typing import Any

from jaxtune.errors import UserError
from jaxtune.metrics import language as languages
from jaxtune.metrics.base import Scores

# Japanese and Korean by character: their word segmentations would be further packages.
TOKENISERS = {"zh": "zh", "ja": "char", "ko": "char", "th": "char"}


def score(predictions: Sequence[str], references: Sequence[str | Sequence[str]], language: str | None = None) -> Scores:
    """Corpus scores, 0 to 100 (TER may be above); a row has one reference or several.

    Args:
      language: the target language, which decides the tokenisation; seen from the references where not given.

    Raises:
      UserError: there is nothing to score.
    """
    from sacrebleu.metrics import BLEU, CHRF, TER

    if not references:
        raise UserError("translation: there are no rows to score; give data with at least one")
    several = [[r] if isinstance(r, str) else list(r) for r in references]
    target = languages.of((t for texts in several for t in texts), language)
    width = max(map(len, several))
    streams: list[Any] = [[texts[i] if i < len(texts) else None for texts in several] for i in range(width)]
    asian = target in TOKENISERS
    bleu = BLEU(tokenize=TOKENISERS.get(target, "13a"))
    by_row = BLEU(tokenize=TOKENISERS.get(target, "13a"), effective_order=True)
    metrics = {"bleu": bleu, "chrf": CHRF(), "ter": TER(asian_support=asian, normalized=asian)}
    values = {name: float(m.corpus_score(list(predictions), streams).score) for name, m in metrics.items()}
    rows = [by_row.sentence_score(p, texts).score for p, texts in zip(predictions, several, strict=True)]
    signatures = {name: str(m.get_signature()) for name, m in metrics.items()}
    return Scores(values, {"language": target, "signatures": signatures}, {"bleu": rows})
