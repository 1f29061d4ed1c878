"""A look inside of a decoder: what each layer gives, where its heads look, and what its matrices are multiplied by.

`look` is for the whole model, within whatever is differentiated or compiled: what is not used of it is never computed.
`Layers` goes through a model one layer at a time, for models whose insides do not all fit at once.

Dimensions: B batch, T time of the queries, S time of the keys, D embed, N query heads, L layers, I inputs of a matrix.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtune.errors import UserError
from jaxtune.layers import Outputs, group_name, rope_tables
from jaxtune.models.decoder import Block, Decoder, DecoderConfig, Own, Where
from jaxtune.nodes.soft_prompt import Prefix
from jaxtune.weights import Array, path_name, take

Tree = Any


class Inside(NamedTuple):
    """What was seen of all layers, in their order."""

    hidden_LBTD: Array  # what each layer gives, before the last norm
    p_LBNTS: Array | None  # how much each query takes from each key, float32; None behind a prefix
    inputs: Mapping[str, Array]  # by matrix, such as "self_attn/q_proj": `[L, B, T, I]`


def look(decoder: DecoderConfig, weights: Tree, batch: Mapping[str, Array]) -> tuple[Outputs, Inside]:
    """The model's outputs for the columns `ids_BT`, `segment_BT` and `position_BT`, and what happened inside.

    Raises:
      UserError: the layers are stages of a pipeline, which show nothing.
    """
    columns = batch["ids_BT"], batch["segment_BT"], batch["position_BT"]
    (outputs, _), seen = Decoder(decoder).apply({"params": weights}, *columns, mutable=["intermediates"])
    groups = [seen["intermediates"].get(name) for name, _, _ in _groups(decoder)]
    if any(g is None for g in groups):
        raise UserError("mesh.stage: the stages of a pipeline show nothing of their inside; take fsdp or tensor")
    stacked = jax.tree.map(lambda *x: jnp.concatenate(x) if len(x) > 1 else x[0], *groups)
    return outputs, Inside(*_sorted(stacked))


def _groups(c: DecoderConfig) -> list[tuple[str, int, int]]:
    """Each group of layers: its name, the first of them, how many they are."""
    counts = c.groups or (c.layers,)
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    return [(group_name(first, count), first, count) for first, count in zip(firsts, counts, strict=True)]


def _sorted(seen: Tree) -> tuple[Array, Array | None, dict[str, Array]]:
    found = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(seen)}
    hidden, p = found.pop("hidden"), found.pop("self_attn/p", None)
    return hidden, p, {name.removesuffix("/x"): x for name, x in found.items()}


@dataclasses.dataclass(frozen=True)
class Layers:
    """A decoder, layer by layer: `first`, then `layer` for each, then `last`, give what the whole model gives."""

    decoder: DecoderConfig

    def first(self, weights: Tree, batch: Mapping[str, Array]) -> Array:
        """`x_BTD`, what goes into the first layer.

        Raises:
          UserError: the tokens have a prefix in every layer's past.
        """
        c, table = self.decoder, weights["embed_tokens"]["weight"]
        if isinstance(table, Prefix):
            raise UserError("a prefix is no part of the layers, which are gone through one by one; leave it off")
        x_BTD = take(table, batch["ids_BT"], jnp.dtype(c.dtype))
        return x_BTD if c.embed_scale == 1.0 else x_BTD * jnp.asarray(c.embed_scale, x_BTD.dtype)

    def layer(self, i: Any, weights: Tree, x_BTD: Array, batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """What layer `i` makes of `x_BTD` with its weights (see `one`), and what its matrices were multiplied by,
        by name: `[B, T, I]`. `i` may be traced: one compilation serves all layers that are alike."""
        c = self.decoder
        tables = rope_tables(c.ropes, batch["position_BT"], batch["segment_BT"])
        rope = jnp.asarray(c.rope_of)[i] if len(set(c.rope_of)) > 1 else None
        window = jnp.asarray([w or 2**30 for w in c.windows])[i] if len(set(c.windows)) > 1 else None
        own, where = Own(None, rope, window), Where(tables, batch["segment_BT"], None)
        block = Block(c, parent=None)
        (x_BTD, _), seen = block.apply({"params": weights}, x_BTD, own, where, mutable=["intermediates"])
        return x_BTD, _sorted(nn.unbox(seen["intermediates"]))[2]

    def last(self, weights: Tree, x_BTD: Array) -> Array:
        """Logits `[B, T, V]`, float32, of what the last layer gives."""
        c = self.decoder
        x_BTD = jnp.asarray(c.norm("norm").clone(parent=None).apply({"params": weights["norm"]}, x_BTD))
        if c.tied and c.task is None:
            return c.readout(x_BTD, weights["embed_tokens"]["weight"])
        head = weights[c.task.module if c.task else "lm_head"]
        return c.readout(x_BTD, (head["weight"], head["bias"]) if "bias" in head else head["weight"])

    def one(self, weights: Tree, i: int) -> Tree:
        """The weights of layer `i`, without the layer axis."""
        name, first, _ = next(g for g in reversed(_groups(self.decoder)) if g[1] <= i)
        return jax.tree.map(lambda x: x[i - first], weights[name])

    def together(self, weights: Tree, layers: list[Tree]) -> Tree:
        """The weights with these instead of their layers'; those of one group have to be of one form."""
        out, rest = dict(weights), iter(layers)
        for name, _, count in _groups(self.decoder):
            out[name] = jax.tree.map(lambda *x: jnp.stack(x), *[next(rest) for _ in range(count)])
        return out
