"""What an adapter puts beside a weight: the shapes and logical axes of each kind's leaves, declared once.

`tuning` fills them with numbers to start from, `hf` with those of a file. In front of each stand the weight's own
leading axes; those that are contracted come first, as in the weight.

Dimensions: r rank; of LoKr m n the input's two factors, l k the output's.
"""

from math import prod

import jax
import numpy as np

from jaxtune.layers import Weight

Leaves = dict[str, Weight]
_Axes = tuple[tuple[int, str], ...]  # sizes and logical names


def sides(w: Weight) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of a matrix's input and output axes."""
    n, m = w.lead, w.lead + w.n_in
    return w.value.shape[n:m], w.value.shape[m:]


def _axes(w: Weight) -> tuple[_Axes, _Axes, _Axes]:
    """Leading, input and output axes."""
    every = tuple(zip(w.value.shape, map(str, w.names), strict=True))
    n, m = w.lead, w.lead + w.n_in
    return every[:n], every[n:m], every[m:]


def _leaf(axes: _Axes, n_in: int = 0) -> Weight:
    sizes, names = tuple(size for size, _ in axes), tuple(name for _, name in axes)
    return Weight(jax.ShapeDtypeStruct(sizes, np.float32), names, n_in=n_in)


def _pair(w: Weight, rank: int) -> tuple[Weight, Weight]:
    """Factors `[in…, r]` and `[r, out…]`."""
    lead, into, out = _axes(w)
    r = ((rank, "rank"),)
    return _leaf((*lead, *into, *r), w.n_in), _leaf((*lead, *r, *out), 1)


def lora(w: Weight, rank: int) -> Leaves:
    """Of a `LoRA`."""
    a, b = _pair(w, rank)
    return {"a": a, "b": b}


def dora(w: Weight, rank: int) -> Leaves:
    """Of a `DoRA`."""
    lead, _, out = _axes(w)
    return {**lora(w, rank), "magnitude": _leaf((*lead, *out))}


def ia3(w: Weight, inputs: bool) -> Leaves:
    """Of an `IA3`."""
    lead, into, out = _axes(w)
    return {"l": _leaf((*lead, *(into if inputs else out)))}


def vera(w: Weight, rank: int) -> Leaves:
    """Of a `VeRA`."""
    lead, _, out = _axes(w)
    return {**lora(w, rank), "lambda_d": _leaf((*lead, (rank, "rank"))), "lambda_b": _leaf((*lead, *out))}


def loha(w: Weight, rank: int) -> Leaves:
    """Of a `LoHa`."""
    a, b = _pair(w, rank)
    return {"a1": a, "b1": b, "a2": a, "b2": b}


def lokr(w: Weight, left: tuple[int, int], rank: int | None) -> Leaves:
    """Of a `LoKr` whose left matrix is `[m, l]`; without a rank the right one is whole."""
    lead, _, _ = _axes(w)
    into, out = sides(w)
    right = prod(into) // left[0], prod(out) // left[1]

    def matrix(*sizes: int) -> Weight:
        return _leaf((*lead, *((n, "rank") for n in sizes)), 1)

    if rank is None:
        return {"left": matrix(*left), "right": matrix(*right)}
    return {"left": matrix(*left), "a": matrix(right[0], rank), "b": matrix(rank, right[1])}
