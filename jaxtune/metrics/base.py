"""What every metric gives, and which of two scores is the better one."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtune.errors import UserError, nearest


class Scores(NamedTuple):
    """Values by name, and what stands behind them."""

    values: dict[str, float]
    details: Mapping[str, Any] = {}  # as JSON has it: per class, confusion, signatures
    rows: Mapping[str, list[float]] = {}  # a value for each prediction, in their order, where that makes sense


GREATER = frozenset(
    "accuracy precision recall f1 precision_macro recall_macro f1_macro precision_micro recall_micro f1_micro "
    "precision_weighted recall_weighted f1_weighted f1_samples mcc exact_match exact_match_flexible pearson spearman "
    "has_answer_exact_match has_answer_f1 no_answer_exact_match no_answer_f1 bleu chrf rouge1 rouge2 rougeL rougeLsum "
    "distinct1 distinct2 mean_length acc acc_norm acc_token token_accuracy".split()
)
LOWER = frozenset({"loss", "perplexity", "ter", "mse", "mae"})


def better(metric: str) -> str:
    """Which values of a metric are better: "max" or "min".

    >>> better("bleu"), better("perplexity")
    ('max', 'min')

    Raises:
      UserError: there is no such metric.
    """
    if metric not in GREATER | LOWER:
        raise UserError(f"metric {metric!r} is not known{nearest(metric, sorted(GREATER | LOWER))}")
    return "max" if metric in GREATER else "min"


def mean(values: list[float]) -> float:
    """The mean; 0 of none."""
    return sum(values) / len(values) if values else 0.0
