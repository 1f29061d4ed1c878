"""How products with weights are computed in training: rounded to 8 bits, or with gradients in float32.

Dimensions: letters of an einsum equation.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.errors import UserError
from jaxtune.nodes.lora import LoRA
from jaxtune.nodes.masked import Masked
from jaxtune.nodes.noisy import Noisy
from jaxtune.nodes.quantized import Quantized
from jaxtune.weights import Array, Node, apply, densify, is_node, node, parts, path_name, precision, static, take

Tree = Any
_MATRIX = re.compile(r"^layers_.*_proj/weight$")
_TABLE = re.compile(r"^(embed_tokens|lm_head)/weight$")
_BITS8 = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}  # of values, of gradients


@node
class Product(Node):
    """An array, masked or not, whose products are computed as said; itself, and what else is done with it, stay the
    same."""

    base: Any
    matmuls: str = static(default="same")  # same · int8 · fp8
    wide: bool = static(default=False)  # its gradient is made in float32, so that it is added up in it over devices


@apply.register
def _(w: Product, eqn: str, x: Array) -> Array:
    return _product(eqn, w.matmuls, w.wide, x, densify(w.base))


@take.register
def _(w: Product, ids: Array, dtype: Any) -> Array:
    return take(w.base, ids, dtype)


@densify.register
def _(w: Product) -> Any:
    return densify(w.base)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(eqn: str, kind: str, wide: bool, x: Array, w: Array) -> Array:
    return _einsum(eqn, kind, x, w.astype(x.dtype), x.dtype)


def _forward(eqn: str, kind: str, wide: bool, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(eqn, kind, wide, x, w), (x, w)


def _backward(eqn: str, kind: str, wide: bool, saved: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    (x, w), e = saved, parts(eqn)
    d_x = _einsum(f"{e.out},{e.w}->{e.x}", kind, d_y, w.astype(x.dtype), x.dtype, 0)
    d_w = _einsum(f"{e.x},{e.out}->{e.w}", kind, x, d_y, jnp.float32 if wide else x.dtype, 1)
    return d_x, d_w.astype(w.dtype)


_product.defvjp(_forward, _backward)


def _einsum(eqn: str, kind: str, a: Array, b: Array, dtype: Any, gradient: int | None = None) -> Array:
    """A product in `dtype`. In 8 bits each number is rounded on a scale of its own for each index that stays, so that
    sums are of whole 8-bit numbers; which of the two is a gradient is said by `gradient`.

    Straight through (Bengio et al., 2013): gradients are those of products that are not rounded, with all rounded.
    """
    if kind == "same":
        return jnp.einsum(eqn, a, b, preferred_element_type=dtype, precision=precision(a.dtype))
    import qwix

    inputs, out = eqn.split("->")
    rounded = [
        qwix.quantize(x, _BITS8[kind][i == gradient], channelwise_axes=[n for n, c in enumerate(names) if c in out])
        for i, (x, names) in enumerate(zip((a, b), inputs.split(","), strict=True))
    ]
    return qwix.einsum(eqn, *rounded, preferred_element_type=jnp.float32).astype(dtype)


def check_qwix(who: str = "train.matmuls") -> None:
    """Look for qwix, which rounds, for what needs it.

    Raises:
      UserError: it is not there.
    """
    try:
        import qwix  # noqa: F401
    except ImportError as e:
        raise UserError(f"{who} needs qwix; pip install 'jaxtune[quant]'") from e


def with_products(weights: Tree, matmuls: str = "same", wide: bool = False) -> Tree:
    """Weights whose products are computed as said; without adapters' or gates', which stay in the compute dtype.

    Args:
      weights: of a model; arrays and nodes.
      matmuls: of the layers' matrices, those under adapters too: "same", "int8" or "fp8".
      wide: whether gradients of matrices, of the table, the head and of LoRA's factors are made in float32.

    Raises:
      UserError: a weight is of a kind for which this is not built.
    """

    def one(path: tuple, w: Any) -> Any:
        name = path_name(path)
        if "/experts/" in name:
            raise UserError(
                f"train.{'matmuls' if matmuls != 'same' else 'reduce_dtype'} is not for experts ({name}); leave it out"
            )
        kind = matmuls if _MATRIX.search(name) else "same"
        if not (kind != "same" or (wide and (_MATRIX.search(name) or _TABLE.search(name)))):
            return w
        return _within(name, w, kind, wide)

    return jax.tree_util.tree_map_with_path(one, weights, is_leaf=is_node)


def _within(name: str, w: Any, kind: str, wide: bool) -> Any:
    if not is_node(w) or isinstance(w, Masked):
        return Product(w, kind, wide)
    if isinstance(w, Quantized) and kind == "same":
        return w  # never trains
    if isinstance(w, Quantized) or (wide and not isinstance(w, LoRA | Noisy)) or getattr(w, "base", None) is None:
        key = "matmuls" if kind != "same" else "reduce_dtype"
        raise UserError(f"train.{key}: {name} is held as {type(w).__name__}, for which it is not built; leave it out")
    factors = {"a": Product(w.a, wide=True), "b": Product(w.b, wide=True)} if wide and isinstance(w, LoRA) else {}
    return dataclasses.replace(w, base=_within(name, w.base, kind, wide), **factors)
