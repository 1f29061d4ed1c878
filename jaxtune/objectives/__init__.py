"""Objectives: pure functions `(outputs, batch) -> (loss_sum, count, metrics)`.

Sums, not means: the step divides once, after accumulation and over all devices, so packing, padding and micro-batches
do not change what a token weighs.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.objectives import heads, pretrain, sft

Objective = Callable[[Any, Mapping[str, Any]], tuple[Any, Any, dict[str, Any]]]

OBJECTIVES: Mapping[str, Objective] = {
    "sft": sft.objective,
    "pretrain": pretrain.objective,
    "classification": heads.classification,
    "regression": heads.regression,
    "token_classification": heads.token_classification,
    "span_qa": heads.span_qa,
}
