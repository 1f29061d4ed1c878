"""Soft prompts: what stands before every text and trains, while the model is as it was. They lie on the token table.

Dimensions: V virtual tokens, D embed, L layers, K key/value heads, H head dim, F width of the encoder.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.weights import Array, Node, apply, densify, node, precision, take

TABLE = "embed_tokens/weight"  # the weight on which soft prompts lie
PROMPT_AXES = ("virtual", "embed")
PREFIX_AXES = ("layers", "kv_heads", "virtual", "head")


@node
class SoftPrompt(Node):
    """Virtual tokens: further rows of a table — prompt tuning (Lester et al., 2021, https://arxiv.org/abs/2104.08691).

    The ids from the table's number of rows on are theirs. As a head the table has its own rows alone.
    """

    base: Any  # [rows, D], or a node of this shape
    prompt: Any  # [V, D], or a `PromptEncoder`

    @property
    def virtual_ids(self) -> range:
        """The ids with which every text starts."""
        return range(self.shape[0], self.shape[0] + self.prompt.shape[0])


class Dense(NamedTuple):
    """An affine layer: `x W + b`."""

    weight: Any  # [in, out]
    bias: Any  # [out]


@node
class PromptEncoder(Node):
    """Virtual tokens made by a network — P-tuning (Liu et al., 2021, https://arxiv.org/abs/2103.10385).

    As peft's MLP: affine layers with a ReLU between two of them, from a table of the same shape.
    """

    table: Any  # [V, D]
    dense: tuple[Dense, ...]  # [D, F], [F, F], [F, D]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.table.shape


@node
class Prefix(Node):
    """Keys and values before every text, of each layer — prefix tuning (Li & Liang, 2021,
    https://arxiv.org/abs/2101.00190).

    Keys are as a cache holds them: after norm and rotation. The decoder reads them, see `models.decoder`; the table is
    as it was.
    """

    base: Any
    k_LKVH: Any
    v_LKVH: Any

    @property
    def tokens(self) -> int:
        return self.k_LKVH.shape[2]


@take.register
def _(w: SoftPrompt, ids: Array, dtype: Any) -> Array:
    rows = w.shape[0]
    own = densify(w.prompt).astype(dtype)[jnp.clip(ids - rows, 0, w.prompt.shape[0] - 1)]
    return jnp.where((ids >= rows)[..., None], own, take(w.base, jnp.minimum(ids, rows - 1), dtype))


@take.register
def _(w: Prefix, ids: Array, dtype: Any) -> Array:
    return take(w.base, ids, dtype)


@apply.register(SoftPrompt)
@apply.register(Prefix)
def _(w: SoftPrompt | Prefix, eqn: str, x: Array) -> Array:
    return apply(w.base, eqn, x)


@densify.register(SoftPrompt)
@densify.register(Prefix)
def _(w: SoftPrompt | Prefix) -> Any:
    return densify(w.base)


@densify.register
def _(w: PromptEncoder) -> Array:
    x = w.table
    for i, layer in enumerate(w.dense):
        x = jax.nn.relu(x) if i else x
        x = jnp.dot(x, layer.weight, precision=precision(x.dtype)) + layer.bias
    return x


def of(weights: Mapping[str, Any]) -> SoftPrompt | Prefix | None:
    """The soft prompt of a decoder's weights, if there is one."""
    table = weights["embed_tokens"]["weight"]
    return table if isinstance(table, SoftPrompt | Prefix) else None
