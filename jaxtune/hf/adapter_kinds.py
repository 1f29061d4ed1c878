"""What each kind of PEFT adapter calls its tensors and writes into its config, beside nodes and their leaves.

All of peft's matrices are ours with their inputs flattened last, `(out, in)`; vectors are vectors.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil, prod
from typing import Any

import numpy as np

from jaxtune import leaves
from jaxtune.hf import layout
from jaxtune.layers import Weight
from jaxtune.nodes.dora import DoRA
from jaxtune.nodes.ia3 import IA3
from jaxtune.nodes.loha import LoHa
from jaxtune.nodes.lokr import LoKr
from jaxtune.nodes.lora import LoRA
from jaxtune.nodes.vera import VeRA

Tensors = dict[str, np.ndarray]
TENSORS: Mapping[str, Mapping[str, str]] = {  # by peft_type: a tensor's name after its module, and our name for it
    "LORA": {
        "lora_A": "a", "lora_B": "b", "lora_embedding_A": "a", "lora_embedding_B": "b",
        "lora_magnitude_vector": "magnitude",
    },
    "ADALORA": {"lora_A": "a", "lora_B": "b", "lora_E": "e"},
    "IA3": {"ia3_l": "l"},
    "VERA": {"vera_lambda_d": "lambda_d", "vera_lambda_b": "lambda_b"},
    "LOHA": {"hada_w1_b": "a1", "hada_w1_a": "b1", "hada_w2_b": "a2", "hada_w2_a": "b2"},
    "LOKR": {
        "lokr_w1": "left", "lokr_w1_a": "left_b", "lokr_w1_b": "left_a",
        "lokr_w2": "right", "lokr_w2_a": "b", "lokr_w2_b": "a",
    },
}  # fmt: skip
NEEDED: Mapping[str, tuple[str, ...]] = {  # keys of adapter_config.json
    "LORA": ("r", "lora_alpha"),
    "ADALORA": ("init_r", "lora_alpha"),
    "IA3": (),
    "VERA": ("r",),
    "LOHA": ("r", "alpha"),
    "LOKR": ("r", "alpha"),
}
SHARED = {"a": "base_model.vera_A", "b": "base_model.vera_B"}  # VeRA's matrices, once for all modules
_TYPES: Mapping[type, str] = {LoRA: "LORA", DoRA: "LORA", IA3: "IA3", VeRA: "VERA", LoHa: "LOHA", LoKr: "LOKR"}


def peft_type(node: Any) -> str:
    """What peft calls a node's kind."""
    return _TYPES[type(node)]


# --- nodes to tensors -------------------------------------------------------------------------------------------------


def plain(node: Any) -> Any:
    """LoRA upon LoRA as one of the sum of their ranks; any other node as it is. Leaves are `Weight`s."""
    if not (isinstance(node, LoRA) and isinstance(node.base, LoRA)):
        return node
    below = plain(node.base)
    a = np.concatenate([node.a.value, below.a.value], -1)
    rank_axis = node.b.names.index("rank")
    b = np.concatenate([node.b.value, np.asarray(below.b.value) * (below.scale / node.scale)], rank_axis)
    return LoRA(below.base, node.a.like(a), node.b.like(b), scale=node.scale)


def rank(node: Any) -> int:
    """The rank that peft's config must name for a node's tensors to have their shapes; 0 where there is none."""
    if isinstance(node, LoKr) and node.right is not None:
        return ceil(max(node.right.value.shape[-2:]) / 2)  # from this on peft holds the right matrix whole
    return (node.a1 if isinstance(node, LoHa) else node.a).value.shape[-1] if not isinstance(node, IA3) else 0


def tensors(node: Any, layer: int) -> Tensors:
    """One layer of a node as peft's tensors, float32, by their names after the module."""
    out = {}
    for name, field in TENSORS[peft_type(node)].items():
        leaf = getattr(node, field, None)
        if leaf is None or "embedding" in name:
            continue
        x = np.asarray(leaf.value[layer] if leaf.stacked else leaf.value, np.float32)
        if isinstance(node, IA3):
            x = x.reshape((1, -1) if node.inputs else (-1, 1))
        else:
            x = x.reshape(prod(x.shape[: leaf.n_in]), -1).T if leaf.n_in else x.reshape(-1)
        out[f"{name}.weight" if name in ("lora_A", "lora_B") else name] = x
    return out


def shared(nodes: Sequence[Any]) -> Tensors:
    """The random matrices of VeRA nodes: those of the largest hold the others'."""
    out = {}
    for field, name in SHARED.items():
        flat = []
        for node in nodes:
            leaf = getattr(node, field)
            x = np.asarray(leaf.value[0] if leaf.stacked else leaf.value, np.float32)
            flat.append(x.reshape(prod(x.shape[: leaf.n_in]), -1).T)
        out[name] = max(flat, key=np.size)
    return out


# --- tensors to nodes -------------------------------------------------------------------------------------------------


def read(kind: str, w: Weight, layers: Sequence[Tensors], scale: float) -> Any:
    """The node upon a weight of peft's tensors, those of each layer by our names.

    Raises:
      KeyError, ValueError: a tensor is missing or does not fit the weight.
    """
    layers = [_AHEAD[kind](t, w) for t in layers]
    cls, shapes, fields = _form(kind, w, layers[0])
    if kind not in ("IA3", "VERA"):
        fields["scale"] = scale
    for field, leaf in shapes.items():
        made = [_ours(t[field], leaf) for t in layers]
        fields[field] = leaf.like(np.stack(made) if w.stacked else made[0])
    return cls(w, **fields)


def _form(kind: str, w: Weight, t: Tensors) -> tuple[type, leaves.Leaves, dict[str, Any]]:
    """The kind of node that tensors make, what leaves it has, and what else it is told."""
    if kind == "IA3":
        inputs = t["l"].shape[0] == 1
        shapes = leaves.ia3(w, inputs)
        return IA3, shapes, {"inputs": inputs, "axes": len(shapes["l"].names) - w.lead}
    if kind == "VERA":
        return VeRA, leaves.vera(w, t["lambda_d"].shape[0]), {}
    if kind == "LOHA":
        return LoHa, leaves.loha(w, t["a1"].shape[0]), {}
    if kind == "LOKR":
        out, into = t["left"].shape
        return LoKr, leaves.lokr(w, (into, out), t["a"].shape[0] if "a" in t else None), {}
    r = t["a"].shape[0] // (w.value.shape[w.names.index("expert")] if "expert" in w.names else 1)
    return (DoRA, leaves.dora(w, r), {}) if "magnitude" in t else (LoRA, leaves.lora(w, r), {})


def _ours(t: np.ndarray, leaf: Weight) -> np.ndarray:
    """One layer's tensor in our layout."""
    if "expert" not in leaf.names:
        return t.T.reshape(layout.body(leaf))
    shape = leaf.value.shape[int(leaf.stacked) :]
    if leaf.names[-1] == "rank":
        return t.reshape(shape[0], shape[-1], -1).transpose(0, 2, 1).reshape(shape)
    return t.reshape(-1, shape[1], shape[0]).transpose(2, 1, 0).reshape(shape)


def _as_it_is(t: Tensors, w: Weight) -> Tensors:
    return t


def _without_values(t: Tensors, w: Weight) -> Tensors:
    """AdaLoRA's singular values within A."""
    return {"a": t["a"] * t["e"], "b": t["b"]}


def _own_part(t: Tensors, w: Weight) -> Tensors:
    """VeRA's shared matrices cut to one weight."""
    into, out = leaves.sides(w)
    return {**t, "a": t["a"][:, : prod(into)], "b": t["b"][: prod(out)]}


def _one_left(t: Tensors, w: Weight) -> Tensors:
    """LoKr's left matrix whole, where both are in factors."""
    return t if "left" in t else {**t, "left": t["left_b"] @ t["left_a"]}


_AHEAD: Mapping[str, Callable[[Tensors, Weight], Tensors]] = {
    "LORA": _as_it_is,
    "ADALORA": _without_values,
    "IA3": _as_it_is,
    "VERA": _own_part,
    "LOHA": _as_it_is,
    "LOKR": _one_left,
}
