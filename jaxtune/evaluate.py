"""Loss, perplexity and token accuracy of weights on packed rows."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxtune.data.pipeline import Batch, Batches, Rows
from jaxtune.objectives import Objective
from jaxtune.training import Apply
from jaxtune.weights import Array

Sums = Callable[[Any, Mapping[str, Array]], tuple[Array, Array, Mapping[str, Array]]]


def make_sums(apply: Apply, objective: Objective) -> Sums:
    """The objective of a batch of `[B, T]` columns, as a pure function of weights and batch."""
    return lambda weights, batch: objective(apply(weights, batch), batch)


def scores(
    sums: Sums, weights: Any, rows: Rows, batch_size: int, put: Callable[[Batch], Mapping[str, Array]]
) -> dict[str, float]:
    """`loss` (nats per token), `perplexity`, `accuracy` (share of tokens guessed first), and further means that the
    objective has, over all rows.

    Sums are added up on the host in double precision, so the result does not depend on the batch size.
    """
    totals: Counter[str] = Counter()
    for batch in Batches(rows, batch_size, seed=None, row_count=len(rows)):
        loss_sum, count, metrics = jax.device_get(sums(weights, put(batch)))
        totals.update({"loss": float(loss_sum), "count": float(count), **{k: float(v) for k, v in metrics.items()}})
    count = max(totals["count"], 1.0)
    loss = totals["loss"] / count
    means = {"accuracy" if k == "hits" else k: x / count for k, x in totals.items() if k not in ("loss", "count")}
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **means}
