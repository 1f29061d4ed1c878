"""Low-rank adapters in SVD form, whose rank is a matter of which singular values are zero."""

from typing import Any

from jaxtune.nodes.lora import LoRA
from jaxtune.weights import Array, apply, densify, node


@node
class AdaLoRA(LoRA):
    """`x W + scale · ((x A) ∘ e) B` — AdaLoRA (Zhang et al., 2023, https://arxiv.org/abs/2303.10512).

    `a` and `b` as in `LoRA`; `e`, of the rank's size, holds the singular values. A triplet (a column of `a`, its `e`, a
    row of `b`) whose `e` is zero adds nothing.
    """

    e: Any = None


def folded(w: AdaLoRA) -> LoRA:
    """The plain LoRA that it amounts to: the singular values multiplied into `a`."""
    between = (1,) * (w.a.ndim - w.e.ndim)
    e = w.e.reshape(*w.e.shape[:-1], *between, w.e.shape[-1])
    return LoRA(w.base, w.a * e, w.b, key=w.key, scale=w.scale, dropout=w.dropout)


@apply.register
def _(w: AdaLoRA, eqn: str, x: Array) -> Array:
    return apply(folded(w), eqn, x)


@densify.register
def _(w: AdaLoRA) -> Any:
    return densify(folded(w))
