"""What a tuning method is, and what is done with one: wrap, label, group, split, join, merge, strip.

Who trains is an ordered list of regexes over plain names (`layers/3/mlp/up_proj/weight`): the first match wins, and
every weight is covered. The label "freeze" means: not differentiated, no optimiser state.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune.config import Optim, Train
from jaxtune.errors import UserError
from jaxtune.layers import Weight, group_name, is_weight, plain_names
from jaxtune.models.decoder import DecoderConfig, abstract_weights
from jaxtune.nodes.quantized import Quantized, block, quantize
from jaxtune.weights import Array, densify, is_node, map_nodes, path_name, under

TRAIN, FROZEN, CHOSEN = "train", "freeze", "chosen"
TEACHER, MATCHING = BESIDE = ("teacher", "matching")  # of distillation, next to a model's own weights
Tree = Any
Wrap = Callable[[str, Weight, Array], Any]


def leave(name: str, weight: Weight, key: Array) -> Any:
    """The wrapping that wraps nothing."""
    return weight


class Method(NamedTuple):
    """A tuning method.

    A label says whether a leaf trains: `FROZEN` ones do not; those of `CHOSEN` are candidates, held in the compute
    dtype, of which `around` trains a part.
    """

    wrap: Wrap  # a weight's plain name, the `Weight` and a key -> the `Weight` or a node of `Weight`s
    rules: Sequence[tuple[str, str]]
    from_base: bool = False  # whether the nodes' own values depend on the base's: `Weight`s come with arrays, then
    made: bool = False  # whether the nodes' own values are there already (an adapter that was read)
    base: tuple[str, int] | None = None  # kind and block size in which frozen matrices of layers are held
    rates: Sequence[tuple[str, float]] = ()  # factors of learning rates, by pattern; the first that matches holds
    around: Callable[[optax.GradientTransformation], optax.GradientTransformation] = lambda tx: tx
    within: Callable[[optax.GradientTransformation, Tree], optax.GradientTransformation] | None = None  # around the
    # optimiser's core, before decay and learning rate; also gets the abstract `Weight`s of what trains
    penalty: Callable[[Tree], Array] | None = None  # of the weights, added to the mean loss
    virtual: int = 0  # virtual tokens before every text, see `Blueprint.virtual_ids`
    past: bool = False  # whether keys and values of its own stand before every text, in each layer
    choice: Callable[[Tree], Mapping[str, Array]] | None = None  # of the optimiser's state: what trains now, by weight


class Training(NamedTuple):
    """What a method may need to know of the run."""

    steps: int = 0  # of the whole run
    optim: Optim = Optim()
    train: Train = Train()
    encode: Callable[[str], Sequence[int]] = lambda text: ()  # a text's tokens


def wrap(method: Method, weights: Tree, key: Array) -> Tree:
    """Put the method's nodes into a tree of `Weight`s; abstract values stay abstract under `jax.eval_shape`."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(weights, is_leaf=is_weight)
    wrapped = [
        method.wrap(plain_names(path_name(p))[0], w, jax.random.fold_in(key, i)) for i, (p, w) in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, wrapped)


def wrapped_shapes(method: Method, weights: Tree) -> Tree:
    """`wrap` of abstract weights; no array is made."""
    return jax.eval_shape(lambda w: wrap(method, w, jax.random.key(0)), weights)


def label(method: Method, weights: Tree) -> Tree:
    """A label for each leaf. The layers of one group agree, see `groups`.

    Raises:
      UserError: no rule covers a weight.
    """

    def one(path: tuple, _: Any) -> str:
        labels = {_first(method.rules, n) for n in plain_names(path_name(path))}
        if len(labels) != 1:
            raise ValueError(f"{path_name(path)} holds layers of several labels: {sorted(labels)}")
        return labels.pop()

    return jax.tree_util.tree_map_with_path(one, weights, is_leaf=is_weight)


def _first(rules: Sequence[tuple[str, str]], name: str) -> str:
    for pattern, found in rules:
        if re.search(pattern, name):
            return found
    raise UserError(f'no rule covers parameter {name!r}; add one, e.g. ("{name}", "{FROZEN}")')


def groups(method: Method, one_group: Mapping[str, Tree], layers: int) -> tuple[int, ...]:
    """How many consecutive layers are alike in what is wrapped and what trains, from first to last.

    `one_group` is the abstract tree of the model with all its layers in one group. Freezing the lower 28 of 32 layers
    gives `(28, 4)`: the backward pass then ends where the second group begins.
    """
    stacked = one_group[group_name(0, layers)]

    def signature(i: int) -> Any:
        single = {group_name(i, 1): jax.tree.map(_one_layer, stacked, is_leaf=is_weight)}
        wrapped = wrapped_shapes(method, single)[group_name(i, 1)]
        shapes = [w.value.shape for w in jax.tree.leaves(wrapped, is_leaf=is_weight)]
        labels = jax.tree.leaves(label(method, {group_name(i, 1): wrapped}))
        return jax.tree.structure(wrapped), shapes, labels

    sizes: list[int] = []
    last = None
    for i in range(layers):
        if (now := signature(i)) == last:
            sizes[-1] += 1
        else:
            sizes.append(1)
        last = now
    return tuple(sizes)


def _one_layer(w: Weight) -> Weight:
    return w.like(jax.ShapeDtypeStruct((1, *w.value.shape[1:]), w.value.dtype))


def covering(patterns: Sequence[str], names: Sequence[str], key: str) -> None:
    """Check that each pattern is a regex that matches a name.

    Raises:
      UserError: names the pattern that does not, and some names that there are.
    """
    for p in patterns:
        try:
            hit = any(re.search(p, n) for n in names)
        except re.error as e:
            raise UserError(f"{key}: {p!r} is not a regular expression: {e}") from e
        if not hit:
            some = dict.fromkeys(re.sub(r"layers/\d+", "layers/N", n) for n in names)
            raise UserError(f"{key}: pattern {p!r} matches no weight; there are {', '.join(some)}")


def named(patterns: Sequence[str], tied: bool) -> list[str]:
    """Patterns, with what "head", "embeddings", "norms" and "biases" mean in their place."""
    aliases = {
        "head": "^embed_tokens/" if tied else "^(lm_head|score|qa_outputs)/",
        "embeddings": "^embed_tokens/",
        "norms": r"norm/weight$",
        "biases": r"/bias$",
    }
    return [aliases.get(p, p) for p in patterns]


def decoder_names(decoder: DecoderConfig) -> list[str]:
    """The plain names of a decoder's weights."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_weights(decoder), is_leaf=is_weight)
    return [n for p, _ in leaves for n in plain_names(path_name(p))]


# --- trees of arrays ------------------------------------------------------------------------------------------------


def split(weights: Tree, labels: Tree) -> tuple[Tree, Tree]:
    """The trainable and the frozen half, each with None where the other has its leaves."""

    def half(trains: bool) -> Tree:
        return jax.tree.map(
            lambda w, found: w if (found != FROZEN) == trains else None, weights, labels, is_leaf=is_weight
        )

    return half(True), half(False)


def join(trainable: Tree, frozen: Tree) -> Tree:
    """The tree that `split` took apart."""
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda x: x is None)


def student(tree: Tree) -> Tree:
    """Of a tree with what trains beside a model, or is looked at there, the model alone: its trainable half, its frozen
    half, or the whole."""
    return {name: x for name, x in tree.items() if name not in BESIDE}


def merge(weights: Tree) -> Tree:
    """Every node as the plain array that it amounts to: the same model, without adapters."""
    return map_nodes(densify, weights)


def strip(weights: Tree) -> Tree:
    """Every node as the weight that it stands on: the model before tuning."""

    return map_nodes(under, weights)


def count(tree: Tree) -> int:
    """Numbers in a tree."""
    return sum(int(x.size) for x in jax.tree.leaves(tree))


def cast(weights: Tree, labels: Tree, compute_dtype: Any, param_dtype: Any = jnp.float32) -> Tree:
    """Abstract `Weight`s in the dtypes they are held in: trained ones `param_dtype`, others the compute dtype."""

    def one(w: Any, found: str) -> Any:
        if not is_weight(w) or not jnp.issubdtype(w.value.dtype, jnp.floating):
            return w
        dtype = param_dtype if found == TRAIN else compute_dtype
        return w.like(jax.ShapeDtypeStruct(w.value.shape, dtype))

    return jax.tree.map(one, weights, labels, is_leaf=is_weight)


def quantized(method: Method, weights: Tree, labels: Tree) -> Tree:
    """The frozen matrices of the layers in the form that `method.base` names; the others as they are."""
    if method.base is None:
        return weights
    kind, group = method.base

    def one(path: tuple, w: Any) -> Any:
        name = plain_names(path_name(path))[0]
        inner = under(w)
        found = jax.tree.leaves(label_of[path_name(path)])[0]
        if found != FROZEN or not quantizable(name, inner, group):
            return w
        return _upon(w, inner, quantize_weight(inner, kind, group))

    label_of = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(labels, is_leaf=is_node)}
    return jax.tree_util.tree_map_with_path(one, weights, is_leaf=lambda x: is_node(x) or is_weight(x))


def quantizable(name: str, w: Weight, group: int) -> bool:
    """Whether a weight is a matrix of a layer, experts' among them, that divides into blocks."""
    matrix = name.startswith("layers/") and w.n_in > 0 and not name.endswith("/mlp/gate/weight")
    return matrix and block(w.value.shape[w.lead + w.n_in - 1], group) > 0


def quantize_weight(w: Weight, kind: str, group: int) -> Quantized:
    """A `Weight`, or an abstract one, as a node of `Weight`s."""
    axis = w.lead + w.n_in - 1 - len(w.names)

    def make(x: Array) -> Quantized:
        return quantize(x, axis, kind, group)

    q = jax.eval_shape(make, w.value) if isinstance(w.value, jax.ShapeDtypeStruct) else make(w.value)
    last = (*w.names[:-1], "rank")  # of what neighbours share: not split
    names = {"codes": w.names, "scale": w.names, "low": last, "step": last}
    return jax.tree_util.tree_map_with_path(lambda p, x: Weight(x, _names(p, names), n_in=w.n_in), q)


def _names(path: tuple, names: Mapping[str, tuple]) -> tuple:
    return names[path[-1].name]


def _upon(w: Any, old: Any, new: Any) -> Any:
    """A node with `new` in the place of `old`, on which it stands."""
    return new if w is old else dataclasses.replace(w, base=_upon(w.base, old, new))
