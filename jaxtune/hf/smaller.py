"""A model with fewer layers, heads or channels, as Hugging Face tensors and a config.json that says so.

Tensors go in and come out as entries, by their names: nothing is read before it is written. What is left is an
ordinary model of its family.

Dimensions: N query heads, K key/value heads, H head dim, F mlp channels.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.errors import UserError
from jaxtune.hf.files import Entry
from jaxtune.models import families
from jaxtune.models.decoder import DecoderConfig

Hf = Mapping[str, Any]
Keep = Sequence[Sequence[int]]  # of each layer, what stays
_LAYER = re.compile(r"^(model\.layers\.)(\d+)(\..+)$")
_BY_LAYER = ("layer_types", "no_rope_layers")  # keys of config.json that have an entry for each layer
_DIVIDES = ("llama", "gemma2", "gemma3_text")  # in which transformers wants hidden_size divided by the heads


class Smaller(NamedTuple):
    """Tensors, and the keys of config.json that are not as they were."""

    tensors: dict[str, Entry]
    changes: dict[str, Any]


def drop_layers(tensors: Mapping[str, Entry], config: Hf, keep: Sequence[int]) -> Smaller:
    """The model with these of its layers, in this order, numbered anew.

    Args:
      tensors: by Hugging Face names.
      config: of its config.json.
      keep: numbers of layers.

    Raises:
      UserError: there is no such layer, or the family's config cannot say which layers these are.
    """
    old = families.from_hf(config)
    if not keep or any(not 0 <= i < old.layers for i in keep):
        raise UserError(f"layers to keep: {list(keep)}; the model has those from 0 to {old.layers - 1}")
    of: dict[int, list[int]] = {}
    for new, i in enumerate(keep):
        of.setdefault(i, []).append(new)
    out = {}
    for name, t in tensors.items():
        if m := _LAYER.match(name):
            out.update({f"{m[1]}{new}{m[3]}": t for new in of.get(int(m[2]), [])})
        else:
            out[name] = t

    def only(x: tuple) -> tuple:
        return tuple(x[i] for i in keep) if x else x

    wanted = dataclasses.replace(old, layers=len(keep), windows=only(old.windows), rope_of=only(old.rope_of))
    changes: dict[str, Any] = {"num_hidden_layers": len(keep)}
    told = families.to_hf(dataclasses.replace(wanted, task=None))
    for key in _BY_LAYER:
        if config.get(key):
            changes[key] = [config[key][i] for i in keep]
        elif key in told:  # what the family's rule said, of layers that now stand elsewhere
            changes[key] = told[key]
    _checked(config, changes, wanted)
    return Smaller(out, changes)


def drop_heads(tensors: Mapping[str, Entry], config: Hf, keep: Keep) -> Smaller:
    """The model with these key/value heads of each layer, equally many, and the query heads that share them.

    Raises:
      UserError: norms span the heads, or transformers has no such number of heads in this family.
    """
    c = families.from_hf(config)
    kept, per = _equal(keep, c.layers, "heads"), c.heads // c.kv_heads
    if c.qk_norm == "whole":
        raise UserError(
            f"{c.family}: queries and keys are normed over all heads together, so none can go; take channels or layers"
        )
    if c.family in _DIVIDES and c.embed % (kept * per):
        fit = [k * per for k in range(1, c.kv_heads) if c.embed % (k * per) == 0]
        raise UserError(
            f"{c.family}: {kept * per} heads do not divide hidden_size {c.embed}, as transformers wants it in this "
            f"family; numbers that do: {', '.join(map(str, fit)) or 'none'}, of {c.heads}"
        )

    def rows(heads: Sequence[int], start: int = 0) -> np.ndarray:
        return (start + np.asarray(heads)[:, None] * c.head + np.arange(c.head)).ravel()

    def places(i: int) -> dict[str, tuple[int, np.ndarray]]:
        groups = sorted(keep[i])
        q = rows([g * per + j for g in groups for j in range(per)])
        k = rows(groups)
        N, K = c.heads * c.head, c.kv_heads * c.head
        both = np.concatenate([q, N + k, N + K + k])
        return {
            **{
                f"self_attn.{n}.{x}": (0, at)
                for n, at in (("q_proj", q), ("k_proj", k), ("v_proj", k), ("qkv_proj", both))
                for x in ("weight", "bias")
            },
            "self_attn.o_proj.weight": (1, q),
        }

    changes = {"num_attention_heads": kept * per, "num_key_value_heads": kept, "head_dim": c.head}
    _checked(config, changes, dataclasses.replace(c, heads=kept * per, kv_heads=kept))
    return Smaller(_picked(tensors, places), changes)


def drop_channels(tensors: Mapping[str, Entry], config: Hf, keep: Keep) -> Smaller:
    """The model with these channels of each layer's mlp, equally many.

    Raises:
      UserError: the model has experts.
    """
    c = families.from_hf(config)
    kept = _equal(keep, c.layers, "channels")
    if c.experts:
        raise UserError(f"{c.family}: experts have channels of their own, which stay; take heads or layers")

    def places(i: int) -> dict[str, tuple[int, np.ndarray]]:
        at = np.sort(np.asarray(keep[i]))
        return {
            **{f"mlp.{n}.{x}": (0, at) for n in ("gate_proj", "up_proj") for x in ("weight", "bias")},
            "mlp.gate_up_proj.weight": (0, np.concatenate([at, c.mlp + at])),
            "mlp.down_proj.weight": (1, at),
        }

    changes = {"intermediate_size": kept}
    _checked(config, changes, dataclasses.replace(c, mlp=kept))
    return Smaller(_picked(tensors, places), changes)


def _equal(keep: Keep, layers: int, what: str) -> int:
    counts = {len(set(k)) for k in keep}
    if len(keep) != layers or len(counts) != 1 or 0 in counts:
        raise UserError(f"{what} to keep: one list for each of {layers} layers, all equally long, is needed")
    return counts.pop()


def _checked(config: Hf, changes: Mapping[str, Any], wanted: DecoderConfig) -> None:
    """Raises: UserError: the changed config is not that of the model which is meant."""
    if _spelled(families.from_hf({**config, **changes})) != _spelled(wanted):
        raise UserError(
            f"{wanted.family}: its config.json cannot say what this smaller model is; take another kind of pruning"
        )


def _spelled(c: DecoderConfig) -> DecoderConfig:
    """With what each layer has of its own spelled out for each: there are several ways to write the same."""
    ropes = tuple(c.ropes[i] for i in c.rope_of or (0,) * c.layers)
    return dataclasses.replace(c, ropes=ropes, rope_of=(), windows=c.windows or (0,) * c.layers)


def _picked(
    tensors: Mapping[str, Entry], places: Callable[[int], Mapping[str, tuple[int, np.ndarray]]]
) -> dict[str, Entry]:
    """Tensors of layers with only some rows (axis 0) or columns (axis 1)."""
    out = dict(tensors)
    for name, t in tensors.items():
        if (m := _LAYER.match(name)) is None or (found := places(int(m[2])).get(m[3][1:])) is None:
            continue

        def data(t: Entry = t, axis: int = found[0], at: np.ndarray = found[1]) -> np.ndarray:
            return np.take(t.data(), at, axis)

        shape = [*t.shape]
        shape[found[0]] = len(found[1])
        out[name] = Entry(tuple(shape), t.dtype, data)
    return out
