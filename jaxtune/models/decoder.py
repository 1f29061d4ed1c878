"""The one decoder-only transformer; every variation is a field of its config.

Dimensions: B batch, T time of the queries, S time of the keys, D embed, N query heads, K key/value heads, H head dim,
F mlp, L layers, V vocab.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtune.layers import Embed, Head, Linear, Outputs, RMSNorm, Rope, attend, constrain, rope_tables, rotate, stack
from jaxtune.weights import Array


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder, and how it is computed."""

    vocab: int  # V
    embed: int  # D
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K
    head: int  # H
    mlp: int  # F
    rope: Rope
    norm_eps: float = 1e-5
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    # how it is computed, not what
    groups: tuple[int, ...] = ()
    remat: str = "none"
    dtype: str = "float32"

    @property
    def dims(self) -> Mapping[str, int]:
        """Sizes of the logical axes."""
        return flax.core.FrozenDict(
            vocab=self.vocab,
            embed=self.embed,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head=self.head,
            mlp=self.mlp,
        )


@flax.struct.dataclass
class Cache:
    """Keys and values of what has been read: `layers` per group of layers, the rest shared by all layers."""

    layers: Mapping[str, tuple[Array, Array]]  # group -> k, v of [L, B, S, K, H]
    segment_BS: Array  # 1 where a token stands, 0 where padding does
    length: Array  # how many of the S places are taken

    @classmethod
    def empty(cls, groups: Mapping[str, int], c: DecoderConfig, batch: int, size: int) -> "Cache":
        def zeros(n: int) -> Array:
            return jnp.zeros((n, batch, size, c.kv_heads, c.head), c.dtype)

        layers = {name: (zeros(n), zeros(n)) for name, n in groups.items()}
        return cls(layers, jnp.zeros((batch, size), jnp.int32), jnp.int32(0))


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    c: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD: Array, cache: Any, where: Any) -> tuple[Array, Any]:
        c, bias = self.c, self.c.attention_bias
        tables, q_segment_BT, k_segment_BS, start = where
        q_BTNH = Linear("btd,dnh->btnh", "embed -> heads head", c.dims, bias, name="q_proj")(x_BTD)
        k_BTKH = Linear("btd,dkh->btkh", "embed -> kv_heads head", c.dims, bias, name="k_proj")(x_BTD)
        v_BTKH = Linear("btd,dkh->btkh", "embed -> kv_heads head", c.dims, bias, name="v_proj")(x_BTD)
        q_BTNH, k_BTKH = rotate(q_BTNH, *tables), rotate(k_BTKH, *tables)
        if cache is not None:
            old_k_BSKH, old_v_BSKH = cache
            k_BTKH = jax.lax.dynamic_update_slice_in_dim(old_k_BSKH, k_BTKH, start, 1)
            v_BTKH = jax.lax.dynamic_update_slice_in_dim(old_v_BSKH, v_BTKH, start, 1)
            cache = k_BTKH, v_BTKH
        o_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, q_segment_BT, k_segment_BS, start)
        return Linear("btnh,nhd->btd", "heads head -> embed", c.dims, bias, name="o_proj")(o_BTNH), cache


class Mlp(nn.Module):
    """The gated feed-forward part (SwiGLU, Shazeer, 2020)."""

    c: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        c, bias = self.c, self.c.mlp_bias
        gate_BTF = Linear("btd,df->btf", "embed -> mlp", c.dims, bias, name="gate_proj")(x_BTD)
        up_BTF = Linear("btd,df->btf", "embed -> mlp", c.dims, bias, name="up_proj")(x_BTD)
        return Linear("btf,fd->btd", "mlp -> embed", c.dims, bias, name="down_proj")(jax.nn.silu(gate_BTF) * up_BTF)


class Block(nn.Module):
    """One layer; `where` says at which positions and segments the tokens stand."""

    c: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD: Array, cache: Any, where: Any) -> tuple[Array, Any]:
        eps = self.c.norm_eps
        a_BTD, cache = Attention(self.c, name="self_attn")(RMSNorm(eps, name="input_layernorm")(x_BTD), cache, where)
        x_BTD = x_BTD + a_BTD
        x_BTD = x_BTD + Mlp(self.c, name="mlp")(RMSNorm(eps, name="post_attention_layernorm")(x_BTD))
        return constrain(x_BTD), cache


class Decoder(nn.Module):
    """Token ids to `Outputs`; with a cache also the cache with these tokens in it.

    `segment_BT` numbers the packed sequences of a row, from 1; 0 is padding. `position_BT` restarts in each.
    """

    c: DecoderConfig

    @nn.compact
    def __call__(
        self, ids_BT: Array, segment_BT: Array, position_BT: Array, cache: Cache | None = None
    ) -> tuple[Outputs, Cache | None]:
        c = self.c
        start: Any = 0
        k_segment_BS = segment_BT
        if cache is not None:
            start = cache.length
            k_segment_BS = jax.lax.dynamic_update_slice_in_dim(cache.segment_BS, segment_BT, start, 1)
        embed = Embed(c.dims, jnp.dtype(c.dtype), name="embed_tokens")
        x_BTD = constrain(embed(ids_BT))
        where = (rope_tables(c.rope, position_BT), segment_BT, k_segment_BS, start)
        layers = {}
        for name, group in stack(Block, c.groups or (c.layers,), c.remat, c):
            x_BTD, layers[name] = group(x_BTD, cache.layers[name] if cache else None, where)
        x_BTD = RMSNorm(c.norm_eps, name="norm")(x_BTD)
        if cache is not None:
            cache = Cache(layers, k_segment_BS, start + ids_BT.shape[1])
        if c.tied:
            return Outputs(x_BTD, embed.weight, "btd,vd->btv"), cache
        return Outputs(x_BTD, Head(c.dims, name="lm_head")(), "btd,dv->btv"), cache


def abstract_weights(c: DecoderConfig) -> Any:
    """The weights of a decoder as `Weight`s with abstract float32 values: names, shapes, axes; no array is made."""
    ids_BT = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.eval_shape(lambda *ids: Decoder(c).init(jax.random.key(0), *ids), ids_BT, ids_BT, ids_BT)["params"]
