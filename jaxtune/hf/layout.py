"""Names and layouts of weights, both ways. Parameters keep their Hugging Face names, so a name is a rule.

Three ways to name a weight: the *path* of a stacked leaf (`layers_0-27/mlp/up_proj/weight`), the *plain name* of one
layer's weight (`layers/3/mlp/up_proj/weight`: what rules and patterns match), and Hugging Face's
(`model.layers.3.mlp.up_proj.weight`).
"""

import re
from math import prod

import numpy as np

from jaxtune.layers import Weight, plain_names

UNTRAINED = re.compile(r"\.rotary_emb\.inv_freq$|\.masked_bias$|\.attn\.bias$")  # buffers that old files carry


def hf_name(plain: str) -> str:
    """A plain name as Hugging Face writes it.

    >>> hf_name("layers/2/mlp/up_proj/weight"), hf_name("lm_head/weight")
    ('model.layers.2.mlp.up_proj.weight', 'lm_head.weight')
    """
    dotted = plain.replace("/", ".")
    return dotted if dotted.startswith("lm_head") else f"model.{dotted}"


def hf_names(path: str) -> list[str]:
    """The Hugging Face names of a path's layers, in order."""
    return [hf_name(p) for p in plain_names(path)]


def transposed(w: Weight) -> bool:
    """Whether Hugging Face stores this weight as `(out, in)`: every matrix but the embedding table."""
    return bool(w.n_in) and w.names[int(w.stacked)] != "vocab"


def hf_shape(w: Weight) -> tuple[int, ...]:
    """The shape of one layer's tensor in a Hugging Face file."""
    body = w.value.shape[int(w.stacked) :]
    if not transposed(w):
        return (prod(body),) if w.n_in == 0 else tuple(body)
    return prod(body[w.n_in :]), prod(body[: w.n_in])


def from_hf(tensor: np.ndarray, w: Weight) -> np.ndarray:
    """One layer's tensor in our layout: a view, so that slicing it reads only the slice."""
    body = w.value.shape[int(w.stacked) :]
    if not transposed(w):
        return tensor.reshape(body)
    n_out = len(body) - w.n_in
    view = tensor.reshape(*body[w.n_in :], *body[: w.n_in])
    return view.transpose(*range(n_out, len(body)), *range(n_out))


def to_hf(array: np.ndarray, w: Weight) -> np.ndarray:
    """One layer's array (without the layer axis) in Hugging Face's layout."""
    if not transposed(w):
        return array.reshape(hf_shape(w))
    return array.reshape(prod(array.shape[: w.n_in]), -1).T
