"""Names and layouts of weights, both ways. Parameters keep their Hugging Face names, so a name is a rule.

Three ways to name a weight: the *path* of a stacked leaf (`layers_0-27/mlp/up_proj/weight`), the *plain name* of one
layer's weight (`layers/3/mlp/up_proj/weight`: what rules and patterns match), and Hugging Face's
(`model.layers.3.mlp.up_proj.weight`). What is one array here may be several tensors there: one for each layer, and for
each expert its gate and its up matrix. The axes along which they lie are *apart*.
"""

import itertools
import re
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from jaxtune.layers import Weight, plain_names
from jaxtune.models.families import FAMILIES

UNTRAINED = re.compile(r"\.rotary_emb\.inv_freq$|\.masked_bias$|\.attn\.bias$")  # buffers that old files carry
OUTSIDE = ("lm_head.", "score.", "qa_outputs.")  # the heads stand beside the body
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def apart(w: Weight) -> tuple[str, ...]:
    """The axes along which Hugging Face holds separate tensors, in order."""
    experts = "expert" in w.names
    return tuple(str(n) for n in w.names if n == "layers" or (experts and n in ("expert", "gate_up")))


def places(w: Weight) -> list[dict[str, int]]:
    """Where each tensor of a weight lies along the axes that are apart, in C order."""
    sizes = dict(zip(w.names, w.value.shape, strict=True))
    names = apart(w)
    return [dict(zip(names, at, strict=True)) for at in itertools.product(*(range(sizes[n]) for n in names))]


def pick(w: Weight, at: Mapping[str, int]) -> Any:
    """The array of one tensor, of a weight or of an adapter's factor that shares axes with it."""
    return w.value[tuple(at.get(str(n), slice(None)) for n in w.names)]


def hf_name(plain: str, family: str) -> str:
    """A plain name as Hugging Face writes it; for experts the name of their module.

    >>> hf_name("layers/2/mlp/up_proj/weight", "llama"), hf_name("lm_head/weight", "llama")
    ('model.layers.2.mlp.up_proj.weight', 'lm_head.weight')
    >>> hf_name("layers/2/mlp/gate/weight", "mixtral")
    'model.layers.2.block_sparse_moe.gate.weight'
    """
    dotted = plain.replace("/", ".")
    if (experts := FAMILIES[family].experts) is not None:
        dotted = dotted.replace(".mlp.", f".{experts.block}.")
    return dotted if dotted.startswith(OUTSIDE) else f"model.{dotted}"


def hf_names(path: str, w: Weight, family: str) -> list[str]:
    """The Hugging Face names of a weight's tensors, in the order of `places`."""
    experts = FAMILIES[family].experts
    out = []
    for plain in plain_names(path):
        name = hf_name(plain, family)
        if "expert" not in apart(w) or experts is None:
            out.append(name)
            continue
        module, matrix = name.rsplit(".", 1)
        parts = (experts.gate, experts.up) if matrix == "gate_up_proj" else (experts.down,)
        out += [f"{module}.{e}.{p}.weight" for e in range(w.value.shape[w.names.index("expert")]) for p in parts]
    return out


def body(w: Weight) -> tuple[int, ...]:
    """The shape of one tensor's array here."""
    outside = apart(w)
    return tuple(s for n, s in zip(w.names, w.value.shape, strict=True) if n not in outside)


def transposed(w: Weight) -> bool:
    """Whether Hugging Face stores this weight as `(out, in)`: every matrix but the embedding table."""
    return bool(w.n_in) and w.names[w.lead] != "vocab"


def hf_shape(w: Weight) -> tuple[int, ...]:
    """The shape of one tensor in a Hugging Face file."""
    sizes = body(w)
    if not transposed(w):
        return (prod(sizes),) if w.n_in == 0 else sizes
    return prod(sizes[w.n_in :]), prod(sizes[: w.n_in])


def from_hf(tensor: np.ndarray, w: Weight, cut: Mapping[int, int] | None = None) -> np.ndarray:
    """One tensor in our layout: a view, so that slicing it reads only the slice.

    `cut` says which axes of ours are shorter in this tensor than in the weight, and how long they are.
    """
    sizes = tuple((cut or {}).get(a, n) for a, n in enumerate(body(w)))
    if not transposed(w):
        return tensor.reshape(sizes)
    n_out = len(sizes) - w.n_in
    view = tensor.reshape(*sizes[w.n_in :], *sizes[: w.n_in])
    return view.transpose(*range(n_out, len(sizes)), *range(n_out))


def to_hf(array: np.ndarray, w: Weight) -> np.ndarray:
    """One tensor's array (see `pick`) in Hugging Face's layout."""
    if not transposed(w):
        return array.reshape(hf_shape(w))
    return array.reshape(prod(array.shape[: w.n_in]), -1).T
