"""Objectives: pure functions `(outputs, batch) -> (loss_sum, count, metrics)`, one a file.

Sums, not means: the step divides once, after accumulation and over all devices, so packing, padding and micro-batches
do not change what a token weighs.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.objectives import pretrain, sft

Objective = Callable[[Any, Mapping[str, Any]], tuple[Any, Any, dict[str, Any]]]

OBJECTIVES: Mapping[str, Objective] = {"sft": sft.objective, "pretrain": pretrain.objective}
