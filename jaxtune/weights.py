"""Weights are values, and `einsum`, `take` and `grouped` are the one seam through which everything uses them.

A weight is an array, or a *node*: a pytree that stands where an array stood and knows how to multiply, see `nodes`. The
model never knows which. Nodes nest, and every leaf of a node keeps the leading layer axis of the array that it
replaced, so nodes pass through `scan` unchanged.

Dimensions: letters of an einsum equation; E experts, M rows of tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Container
from math import prod
from typing import Any, NamedTuple, dataclass_transform

import jax
import jax.numpy as jnp

Array = jax.Array
Tree = Any


class Node:
    """Base class of everything that stands in the place of an array: upon a weight, its field `base`, or instead."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return under(self).shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def seeded(self, key: Array) -> "Node":
        """With a key for what is random in training; without one nothing is."""
        return self


def under(w: Any) -> Any:
    """The weight that nodes stand upon: an array, or a node that stands in its place (quantised)."""
    while isinstance(w, Node) and getattr(w, "base", None) is not None:
        w = w.base  # type: ignore[attr-defined]
    return w


@dataclass_transform(frozen_default=True)
def node(cls: type) -> type:
    """Make a frozen dataclass that is a pytree; fields declared with `static()` are compile-time constants."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def static(**kwargs: Any) -> Any:
    """A dataclass field that is part of the tree's structure, not a leaf."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def is_node(x: object) -> bool:
    """Whether this stands in the place of an array (as a leaf, for `jax.tree` functions)."""
    return isinstance(x, Node)


class Equation(NamedTuple):
    """An equation of one input and one weight, taken apart."""

    x: str  # dimensions of the input
    w: str  # dimensions of the weight
    out: str  # dimensions of the result
    into: str  # contracted dimensions of the weight
    outof: str  # dimensions of the weight that the result has
    batch: str  # dimensions of the input that the result has


@functools.cache
def parts(eqn: str) -> Equation:
    """Take `"btd,dnh->btnh"` apart.

    >>> parts("btd,dnh->btnh").into, parts("btd,dnh->btnh").outof, parts("btd,dnh->btnh").batch
    ('d', 'nh', 'bt')
    """
    inputs, out = eqn.split("->")
    x, w = inputs.split(",")
    into = "".join(c for c in w if c not in out)
    return Equation(x, w, out, into, "".join(c for c in w if c in out), "".join(c for c in x if c not in into))


@functools.singledispatch
def apply(w: Any, eqn: str, x: Array) -> Array:
    """The product of input and weight; a node registers its own."""
    w, e = w.astype(x.dtype), parts(eqn)
    in_order = e.x == e.batch + e.into and e.out == e.batch + e.outof and e.w in (e.into + e.outof, e.outof + e.into)
    if in_order and platform() == "cpu" and jax.sharding.get_abstract_mesh().shape.get("context", 1) == 1:
        return _flat_matmul(w, e, x)
    return jnp.einsum(eqn, x, w, precision=precision(x.dtype))


def platform() -> str:
    """What is compiled for, "cpu", "gpu" or "tpu": the platform of the mesh that is set, else of the default back end.

    They differ where a step is planned for another machine.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if (kind := getattr(device, "device_kind", None)) is None:
        return jax.default_backend()
    named = {"cuda": "gpu", "rocm": "gpu"}.get(found := getattr(device, "platform", ""), found)
    return named or ("tpu" if kind.startswith("TPU") else "cpu" if kind == "cpu" else "gpu")


def precision(dtype: Any) -> jax.lax.Precision:
    """float32 is computed as float32, not in the fewer bits that TPUs and GPUs take by default."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _flat_matmul(w: Array, e: Equation, x: Array) -> Array:
    """One two-dimensional matrix product: XLA on CPU runs it on the fast path, `[B, T, D]` inputs it does not.

    B and T that are both split over a mesh cannot be made one dimension without gathering T.
    """
    n_batch, n_w = len(e.batch), len(e.into) if e.w.startswith(e.into) else len(e.outof)
    x_XI = x.reshape(-1, prod(x.shape[n_batch:]))
    w_2d = w.reshape(prod(w.shape[:n_w]), -1)
    into_axis = 0 if e.w.startswith(e.into) else 1
    dims = (((1,), (into_axis,)), ((), ()))
    y_XO = jax.lax.dot_general(x_XI, w_2d, dims, precision=precision(x.dtype))
    sizes = dict(zip(e.w, w.shape, strict=True))
    return y_XO.reshape(*x.shape[:n_batch], *(sizes[c] for c in e.outof))


def einsum(eqn: str, x: Array, w: Any) -> Array:
    """Multiply `x` by a weight. The weight is cast to the input's dtype where it is used.

    >>> einsum("btd,df->btf", jnp.ones((1, 2, 3)), jnp.ones((3, 4))).shape
    (1, 2, 4)
    """
    return apply(w, eqn, x)


@functools.singledispatch
def take(w: Any, ids: Array, dtype: Any) -> Array:
    """Rows of an embedding table: `w[ids]`, in `dtype`."""
    return w[ids].astype(dtype)


@functools.singledispatch
def grouped(w: Any, x: Array, sizes_E: Array) -> Array:
    """Rows of `x` `[M, in]`, sorted by expert, each times the matrix of its own expert in `w` `[E, in, out…]`.

    The first `sizes_E[0]` rows belong to the first expert, and so on; what rows beyond all groups give is undefined.

    >>> grouped(jnp.stack([jnp.eye(2), 2 * jnp.eye(2)]), jnp.ones((3, 2)), jnp.array([1, 2])).tolist()
    [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    """
    w_EIO = w.astype(x.dtype).reshape(*w.shape[:2], -1)
    return jax.lax.ragged_dot(x, w_EIO, sizes_E, precision=precision(x.dtype)).reshape(-1, *w.shape[2:])


@functools.singledispatch
def densify(w: Any) -> Any:
    """The plain array that a node amounts to, in the dtype of the weight it stands on."""
    return w


def map_nodes(f: Callable[[Any], Any], weights: Tree) -> Tree:
    """Apply `f` to every weight of a tree, an array or a whole node at a time."""
    return jax.tree.map(f, weights, is_leaf=is_node)


def seeded(weights: Tree, key: Array) -> Tree:
    """Give every node a key of its own for what is random in training."""
    leaves, tree = jax.tree.flatten(weights, is_leaf=is_node)
    keyed = [w.seeded(jax.random.fold_in(key, i)) if is_node(w) else w for i, w in enumerate(leaves)]
    return jax.tree.unflatten(tree, keyed)


def path_name(path: tuple) -> str:
    """A tree path as `a/b/c`, the form in which rules, errors and checkpoints name a weight.

    >>> path_name(jax.tree_util.tree_leaves_with_path({"mlp": {"weight": 1}})[0][0])
    'mlp/weight'
    """
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def owner(path: str, names: Container[str]) -> str | None:
    """The longest end of a path that is among `names`: the weight that a leaf of an optimiser's state belongs to.

    >>> owner("0/mu/mlp/weight", ["mlp/weight"])
    'mlp/weight'
    """
    parts = path.split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((end for end in ends if end in names), None)
