"""The one decoder-only transformer; every variation is a field of its config.

Dimensions: B batch, T time of the queries, S time of the keys, D embed, N query heads, K key/value heads, H head dim,
F mlp, V vocab, E experts, L layers, C outputs of a head, R rotated part of a head.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from jaxtune.attention import PREFIX, Past, Scores, after, attend_past, probabilities, rounded
from jaxtune.errors import UserError
from jaxtune.kernels import attend
from jaxtune.layers import (
    LAYER_INPUT,
    REMAT_POLICIES,
    Embed,
    Head,
    Linear,
    Outputs,
    Readout,
    RMSNorm,
    Rope,
    constrain,
    group_name,
    rope_tables,
    rotate,
    show,
    stack,
)
from jaxtune.models import pipeline
from jaxtune.models.heads import TaskHead
from jaxtune.models.moe import Moe, balance
from jaxtune.nodes.soft_prompt import Prefix
from jaxtune.weights import Array

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Norms(NamedTuple):
    """Names of a layer's norms, None where there is none: before and after attention, before and after the mlp."""

    attention_in: str | None
    attention_out: str | None
    mlp_in: str | None
    mlp_out: str | None


NORMS: Mapping[str, Norms] = {
    "pre": Norms("input_layernorm", None, "post_attention_layernorm", None),
    "post": Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": Norms(
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    ),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder, and how it is computed."""

    vocab: int  # V, tokens
    embed: int  # D
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K
    head: int  # H
    mlp: int  # F; of one expert, where there are experts
    ropes: tuple[Rope | None, ...]  # the position embeddings that layers choose from; None is no rotation (NoPE)
    context: int = 2048  # positions that the model is made for, scalings included
    family: str = "llama"  # Hugging Face's model_type
    tied: bool = False
    act: str = "silu"  # silu · gelu · gelu_tanh
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    fused: bool = False  # one matrix for queries, keys and values, and one for gate and up (Phi)
    # norms
    norms: str = "pre"  # pre · post · both
    norm_eps: float = 1e-5
    norm_around_one: bool = False
    qk_norm: str = "none"  # none · head · whole: of queries and keys, over each head or all heads together
    # attention
    rope_of: tuple[int, ...] = ()  # per layer, which of `ropes`; empty: the first
    windows: tuple[int, ...] = ()  # per layer, how many keys a query sees, 0 is all; empty: all
    attention_scale: float | None = None  # 1/√H where None
    attention_softcap: float = 0.0
    # scales
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    # mixture of experts
    experts: int = 0  # E
    top_k: int = 0
    normalise_top_k: bool = True
    router_loss: float = 0.0  # weight of the load-balancing loss, where the model's config asks for it
    task: TaskHead | None = None  # the head that stands in the place of the language model's
    # how it is computed, not what
    vocab_rows: int = 0  # rows of the table, with padding; 0 is `vocab`
    groups: tuple[int, ...] = ()
    remat: str = "none"
    kv: str = "same"  # how a cache holds keys and values: same · int8
    attention: str = "xla"  # the kernel, see `kernels.kind`; what goes into a cache is computed by XLA
    dtype: str = "float32"

    @property
    def rows(self) -> int:
        """Rows of the embedding table and of the head."""
        return self.vocab_rows or self.vocab

    @property
    def dims(self) -> Mapping[str, int]:
        """Sizes of the logical axes."""
        return flax.core.FrozenDict(
            vocab=self.rows,
            embed=self.embed,
            heads=self.heads,
            kv_heads=self.kv_heads,
            qkv_heads=self.heads + 2 * self.kv_heads,
            head=self.head,
            mlp=self.mlp,
            expert_mlp=self.mlp,
            gate_up=2,
            expert=self.experts,
            router=self.experts,
            classes=self.task.size if self.task else 0,
        )

    @property
    def readout(self) -> Readout:
        """How its hidden states become logits."""
        if self.task is not None:
            return Readout("btd,dc->btc")
        eqn = "btd,vd->btv" if self.tied else "btd,dv->btv"
        return Readout(eqn, self.logit_scale, self.logit_softcap, self.vocab)

    def norm(self, name: str, axes: str = "embed") -> RMSNorm:
        return RMSNorm(self.norm_eps, axes, self.norm_around_one, name=name)


@flax.struct.dataclass
class Cache:
    """Keys and values of what has been read: `layers` per group of layers, the rest shared by all layers."""

    layers: Mapping[str, tuple[Any, Any]]  # group -> k, v of [L, B, K, S, H], or `attention.Rounded`
    segment_BS: Array  # 1 where a token stands, 0 where padding or nothing does, `PREFIX` in a prefix
    length: Array  # how many of the S places are taken

    def grown(self, size: int) -> "Cache":
        """With so many places."""
        more = size - self.segment_BS.shape[1]
        layers = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more), (0, 0))), self.layers)
        return Cache(layers, jnp.pad(self.segment_BS, ((0, 0), (0, more))), self.length)

    def with_new(self, layers: Mapping[str, tuple[Any, Any]], segment_BT: Array) -> "Cache":
        """With new keys and values, `[L, B, K, T, H]`, in the next places."""

        def put(old: Array, new: Array, axis: int) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), self.length, axis)

        both = jax.tree.map(lambda old, new: put(old, new, 3), dict(self.layers), dict(layers))
        return Cache(both, put(self.segment_BS, segment_BT, 1), self.length + segment_BT.shape[1])


def prefix_cache(prefix: Prefix, groups: Sequence[int], rows: int, dtype: Any, kv: str = "same") -> Cache:
    """A prefix as the past of so many rows, held as `DecoderConfig.kv` says."""
    layers, first = {}, 0
    for count in groups:
        pair = (x_LKVH[first : first + count, None].astype(dtype) for x_LKVH in (prefix.k_LKVH, prefix.v_LKVH))
        k, v = (jnp.broadcast_to(x, (count, rows, *x.shape[2:])) for x in pair)
        layers[group_name(first, count)] = (rounded(k), rounded(v)) if kv == "int8" else (k, v)
        first += count
    return Cache(layers, jnp.full((rows, prefix.tokens), PREFIX, jnp.int32), jnp.int32(prefix.tokens))


class Where(NamedTuple):
    """At which positions and segments tokens stand; the same for every layer."""

    tables: tuple[Array, Array]  # of `rope_tables`
    segment_BT: Array
    past: Any  # segment_BS and length of the cache, and the positions here; None without


class Own(NamedTuple):
    """What a layer has of its own, beside its weights."""

    cache: Any  # k, v of the past; () where there is none but the new ones are wanted; None where they are not
    rope: Any  # which table; None is the first
    window: Any  # how many keys a query sees; None is the config's one window


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    c: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD: Array, own: Own, where: Where) -> tuple[Array, Any]:
        c = self.c
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD)
        if c.qk_norm != "none":
            q_axes, k_axes = ("heads head", "kv_heads head") if c.qk_norm == "whole" else ("head", "head")
            q_BTNH, k_BTKH = c.norm("q_norm", q_axes)(q_BTNH), c.norm("k_norm", k_axes)(k_BTKH)
        table = [t[0 if own.rope is None else own.rope] for t in where.tables]
        q_BTNH, k_BTKH = rotate(q_BTNH, *table), rotate(k_BTKH, *table)
        scores = Scores(c.attention_scale, c.attention_softcap)
        window = (c.windows[0] if c.windows else 0) if own.window is None else own.window
        new = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
        if own.cache:
            past = Past(*own.cache, *where.past)
            o_BTNH = attend_past(q_BTNH, *new, where.segment_BT, past, scores, window)
            new = after(new[0], o_BTNH), after(new[1], o_BTNH)  # so that they are written over a past that was read
        else:
            show(self, "p", lambda: probabilities(q_BTNH, k_BTKH, where.segment_BT, scores, window))
            kernel = c.attention if own.cache is None else "xla"
            o_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, where.segment_BT, scores, window, c.windows, kernel)
        kept: Any = None if own.cache is None else new
        if kept is not None and c.kv == "int8":
            kept = rounded(new[0]), rounded(new[1])
        return Linear("btnh,nhd->btd", "heads head -> embed", c.dims, c.o_bias, name="o_proj")(o_BTNH), kept

    def _project(self, x_BTD: Array) -> tuple[Array, Array, Array]:
        c, bias = self.c, self.c.qkv_bias
        if c.fused:
            qkv_BTMH = Linear("btd,dmh->btmh", "embed -> qkv_heads head", c.dims, bias, name="qkv_proj")(x_BTD)
            q_BTNH, k_BTKH, v_BTKH = jnp.split(qkv_BTMH, [c.heads, c.heads + c.kv_heads], 2)
            return q_BTNH, k_BTKH, v_BTKH
        return (
            Linear("btd,dnh->btnh", "embed -> heads head", c.dims, bias, name="q_proj")(x_BTD),
            Linear("btd,dkh->btkh", "embed -> kv_heads head", c.dims, bias, name="k_proj")(x_BTD),
            Linear("btd,dkh->btkh", "embed -> kv_heads head", c.dims, bias, name="v_proj")(x_BTD),
        )


class Mlp(nn.Module):
    """The gated feed-forward part (GLU variants, Shazeer, 2020)."""

    c: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        c, bias = self.c, self.c.mlp_bias
        if c.fused:
            both_BTcF = Linear("btd,dcf->btcf", "embed -> gate_up mlp", c.dims, bias, name="gate_up_proj")(x_BTD)
            gate_BTF, up_BTF = both_BTcF[:, :, 0], both_BTcF[:, :, 1]
        else:
            gate_BTF = Linear("btd,df->btf", "embed -> mlp", c.dims, bias, name="gate_proj")(x_BTD)
            up_BTF = Linear("btd,df->btf", "embed -> mlp", c.dims, bias, name="up_proj")(x_BTD)
        hidden_BTF = ACTIVATIONS[c.act](gate_BTF) * up_BTF
        return Linear("btf,fd->btd", "mlp -> embed", c.dims, bias, name="down_proj")(hidden_BTF)


class Block(nn.Module):
    """One layer. Gives its keys and values, and how its router chose, beside the hidden states."""

    c: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD: Array, own: Own, where: Where) -> tuple[Array, tuple[Any, Any]]:
        c, names = self.c, NORMS[self.c.norms]
        x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)

        def norm(name: str | None, x_BTD: Array) -> Array:
            return x_BTD if name is None else c.norm(name)(x_BTD)

        a_BTD, cache = Attention(c, name="self_attn")(norm(names.attention_in, x_BTD), own, where)
        x_BTD = x_BTD + norm(names.attention_out, a_BTD) * c.residual_scale
        h_BTD, routed = norm(names.mlp_in, x_BTD), None
        if c.experts:
            moe = Moe(c.dims, ACTIVATIONS[c.act], c.top_k, c.normalise_top_k, name="mlp")
            m_BTD, routed = moe(h_BTD, where.segment_BT)
        else:
            m_BTD = Mlp(c, name="mlp")(h_BTD)
        x_BTD = x_BTD + norm(names.mlp_out, m_BTD) * c.residual_scale
        show(self, "hidden", lambda: x_BTD)
        return constrain(x_BTD), (cache, routed)


class Decoder(nn.Module):
    """Token ids to `Outputs`; with a cache, or where one is to be kept, also the cache with these tokens in it.

    `segment_BT` numbers the packed sequences of a row, from 1; 0 is padding. `position_BT` restarts in each. A
    `Prefix` on the token table is the past of every sequence, whose positions then begin after it.
    """

    c: DecoderConfig

    @nn.compact
    def __call__(
        self, ids_BT: Array, segment_BT: Array, position_BT: Array, cache: Cache | None = None, keep: bool = False
    ) -> tuple[Outputs, Cache | None]:
        c = self.c
        embed = Embed(c.dims, jnp.dtype(c.dtype), name="embed_tokens")
        x_BTD = constrain(embed(ids_BT))
        if c.embed_scale != 1.0:
            x_BTD = x_BTD * jnp.asarray(c.embed_scale, x_BTD.dtype)
        groups = c.groups or (c.layers,)
        prefix = embed.weight if isinstance(embed.weight, Prefix) else None
        begins = cache is None and prefix is not None
        if begins and not keep and pipeline.stages() > 1:
            raise UserError("mesh.stage: a prefix stands in every layer's past, which stages lack; take fsdp or tensor")
        if prefix is not None:
            position_BT = position_BT + prefix.tokens
            cache = prefix_cache(prefix, groups, ids_BT.shape[0], x_BTD.dtype, c.kv) if cache is None else cache
        past = None if cache is None else (cache.segment_BS, cache.length, position_BT)
        where = Where(rope_tables(c.ropes, position_BT, segment_BT), segment_BT, past)
        rope_L = np.array(c.rope_of, np.int32) if len(set(c.rope_of)) > 1 else None
        window_L = np.array([w or 2**30 for w in c.windows], np.int32) if len(set(c.windows)) > 1 else None
        layers, routed, first = {}, [], 0
        for count, (name, group) in zip(groups, stack(Block, groups, c.remat, c), strict=True):
            here = slice(first, first + count)
            rope, window = (None if x is None else jnp.asarray(x[here]) for x in (rope_L, window_L))
            own = Own(cache.layers[name] if cache else () if keep else None, rope, window)
            if pipeline.stages() > 1 and own.cache is None and not self.is_initializing():
                x_BTD = self._staged(self.variables["params"][name], x_BTD, own, where)
            else:
                x_BTD, (layers[name], chose) = group(x_BTD, own, where)
                routed.append(chose)
            first += count
        x_BTD = c.norm("norm")(x_BTD)
        if begins and cache is not None:
            cache = cache.grown(cache.segment_BS.shape[1] + ids_BT.shape[1]) if keep else None
        if cache is not None:
            cache = cache.with_new(layers, segment_BT)
        elif keep:
            cache = Cache(layers, segment_BT, jnp.int32(ids_BT.shape[1]))
        loss = None
        if c.experts:
            taken_E, p_E = (sum(x.sum(0) for x in xs) for xs in zip(*routed, strict=True))
            loss = balance(taken_E, p_E, c.layers * (segment_BT > 0).sum())
        if c.task is not None:
            head = Head(c.dims, "classes", c.task.bias, name=c.task.module)()
        else:
            head = embed.weight if c.tied else Head(c.dims, name="lm_head")()
        return Outputs(x_BTD, head, c.readout, loss), cache

    def _staged(self, weights_L: Any, x_BTD: Array, own: Own, where: Where) -> Array:
        """The layers as stages of a pipeline."""
        block = Block(self.c, parent=None)

        def layer(weights: Any, x_bTD: Array, own: Own, rest: Any) -> Array:
            cos, sin, segment_bT = rest
            tables = jnp.moveaxis(cos, 1, 0), jnp.moveaxis(sin, 1, 0)
            return block.apply({"params": weights}, x_bTD, own, Where(tables, segment_bT, None))[0]

        if (policy := REMAT_POLICIES[self.c.remat]) is not None:
            layer = jax.checkpoint(layer, prevent_cse=False, policy=policy)
        by_row = (jnp.moveaxis(t, 1, 0) for t in where.tables)
        return pipeline.run(layer, weights_L, x_BTD, own, (*by_row, where.segment_BT))


def abstract_weights(c: DecoderConfig) -> Any:
    """The weights of a decoder as `Weight`s with abstract float32 values: names, shapes, axes; no array is made."""
    ids_BT = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.eval_shape(lambda *ids: Decoder(c).init(jax.random.key(0), *ids), ids_BT, ids_BT, ids_BT)["params"]
