"""Errors and correlations of numbers."""

from collections.abc import Sequence

import numpy as np

from jaxtune.errors import UserError
from jaxtune.metrics.base import Scores


def score(predictions: Sequence[float], references: Sequence[float]) -> Scores:
    """Mean squared and absolute error, Pearson's and Spearman's correlation (0 where one side does not vary).

    >>> score([1.0, 2.0, 4.0], [1.0, 2.0, 2.0]).values["mae"]
    0.6666666666666666

    Raises:
      UserError: there is nothing to score, or a number is not finite.
    """
    from scipy.stats import rankdata

    p, r = np.asarray(predictions, np.float64), np.asarray(references, np.float64)
    if p.shape != r.shape:
        raise ValueError(f"{p.size} predictions for {r.size} references")
    if not p.size:
        raise UserError("regression: there are no rows to score; give data with at least one")
    if bad := [i for i in range(p.size) if not np.isfinite([p[i], r[i]]).all()]:
        raise UserError(f"regression: row {bad[0] + 1} has no finite number ({p[bad[0]]} for {r[bad[0]]}); correct it")
    errors = p - r
    values = {
        "mse": float(np.mean(errors**2)),
        "mae": float(np.mean(np.abs(errors))),
        "pearson": _correlation(p, r),
        "spearman": _correlation(rankdata(p), rankdata(r)),
    }
    return Scores(values, {"rows": int(p.size)}, {"mae": np.abs(errors).tolist()})


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.clip(a @ b / size, -1, 1)) if size > 0 else 0.0
