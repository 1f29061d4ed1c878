"""Weights of layers of which a part trains at a time: masters and optimiser state in slots, chosen anew now and then.

A stacked weight stays whole, in the compute dtype, and is differentiated whole. Of its layers, those that are chosen
have a float32 master and the optimiser's state in one of a fixed number of slots: shapes never change, and memory is
that of the slots.

Dimensions: L layers of a stacked weight, S its slots.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune.config import Optim
from jaxtune.errors import UserError
from jaxtune.layers import plain_names
from jaxtune.models.decoder import DecoderConfig
from jaxtune.tuning.method import CHOSEN, Method, Training, covering, decoder_names, label, leave, named
from jaxtune.weights import Array, owner, path_name

Tree = Any
Stacks = Mapping[str, Array]  # by path: of each stacked weight, or of its slots
_OPTIMISERS = ("adamw", "adamw8bit", "lion", "sgd")


class Seen(NamedTuple):
    """What a choice can go by."""

    step: Array  # int32, steps taken before this one
    grads: Stacks  # [L, …]
    weights: Stacks  # [L, …]
    layers: Stacks  # int32 [S], which layer trained in each slot up to now; L in an empty one
    moved: Stacks  # float32 [S], sum of squares of what it has learned since it was chosen; without `measure` empty


class Chooser(NamedTuple):
    """Who trains: what differs between the methods."""

    slots: Callable[[int], int]  # of a stack of so many layers
    start: Callable[[Stacks], Tree]  # what it remembers, at first
    watch: Callable[[Tree, Seen], Tree]  # what it remembers after a step's gradients
    due: Callable[[Array], Array]  # whether it chooses before this step's update
    choose: Callable[[Tree, Seen], Stacks]  # bool [L], of each stack
    restart: bool  # whether those that are chosen again begin anew too
    measure: bool = False  # whether it is told what layers have learned


class BlockState(NamedTuple):
    """Of the optimiser inside, which knows the slots instead of the stacks, and of the choice."""

    inner: Tree
    step: Array  # int32, steps taken
    memory: Tree  # the chooser's
    layers: Stacks  # int32 [S]; L in an empty slot
    age: Stacks  # int32 [S], steps that the slot's layer has trained
    masters: Stacks  # float32 [S, …]
    first: Stacks  # [S, …], the layers as they were chosen, in the weight's dtype; without `measure` empty


def check(method: str, training: Training, decoder: DecoderConfig) -> None:
    """Raises: UserError: the optimiser has no state, or settings, that can follow single layers."""
    o = training.optim
    if o.name not in _OPTIMISERS:
        raise UserError(
            f"tuning.method={method} with optim.name={o.name} is not supported: its state cannot begin anew for single "
            f"layers; take one of {', '.join(_OPTIMISERS)}"
        )
    if training.train.param_dtype != "float32":
        raise UserError(
            f"tuning.method={method} with train.param_dtype={training.train.param_dtype} is not supported: what is "
            "chosen has float32 masters, and the rest would have moments of another dtype; leave it out"
        )
    if o.layer_decay != 1:
        raise UserError(
            f"tuning.method={method} with optim.layer_decay is not supported: a slot holds one layer after another; "
            "leave it out"
        )
    names, patterns = decoder_names(decoder), named([g.match for g in o.groups], decoder.tied)
    covering(patterns, names, "optim.groups")
    for pattern in patterns:
        hit = [n for n in names if n.startswith("layers/") and re.search(pattern, n)]
        if len(hit) != decoder.layers * len({n.split("/", 2)[2] for n in hit}):
            raise UserError(
                f"optim.groups: {pattern!r} tells layers apart, which tuning.method={method} cannot: a slot holds one "
                "layer after another; match all layers or none"
            )


def layer_numbers(path: str) -> list[int]:
    """The layers that a stacked weight holds."""
    return [int(name.split("/")[1]) for name in plain_names(path)]


def around(
    tx: optax.GradientTransformation, rules: Sequence[tuple[str, str]], chooser: Chooser, optim: Optim
) -> optax.GradientTransformation:
    """`tx` over what trains all the time and over the slots of what is chosen among the weights labelled `CHOSEN`.

    Updates of stacks are new − old, zero for layers that are not chosen.
    """
    labels_of = Method(leave, rules)

    def stacks(tree: Tree) -> dict[str, Array]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        labels = jax.tree.leaves(label(labels_of, tree))
        return {path_name(p): x for (p, x), found in zip(leaves, labels, strict=True) if found == CHOSEN}

    def init(params: Tree) -> BlockState:
        whole = stacks(params)
        S = {name: chooser.slots(x.shape[0]) for name, x in whole.items()}
        layers = {name: jnp.full(S[name], x.shape[0], jnp.int32) for name, x in whole.items()}
        age = {name: jnp.zeros(S[name], jnp.int32) for name in whole}
        masters = {name: jnp.zeros((S[name], *x.shape[1:]), jnp.float32) for name, x in whole.items()}
        first = {name: m.astype(whole[name].dtype) for name, m in masters.items()} if chooser.measure else {}
        inner = tx.init(_swap(params, masters))
        return BlockState(inner, jnp.int32(0), chooser.start(whole), layers, age, masters, first)

    def update(grads: Tree, state: BlockState, params: Tree | None = None) -> tuple[Tree, BlockState]:
        g, w = stacks(grads), stacks(params)
        moved = {name: _squares(state.masters[name] - x) for name, x in state.first.items()}
        seen = Seen(state.step, g, w, state.layers, moved)
        memory = chooser.watch(state.memory, seen)

        def anew() -> tuple[Stacks, Stacks]:
            chosen = chooser.choose(memory, seen)
            assigned = {name: assign(at, chosen[name], chooser.restart) for name, at in state.layers.items()}
            return {name: at for name, (at, _) in assigned.items()}, {name: new for name, (_, new) in assigned.items()}

        def still() -> tuple[Stacks, Stacks]:
            return dict(state.layers), {name: jnp.zeros(at.shape, bool) for name, at in state.layers.items()}

        layers, fresh = jax.lax.cond(chooser.due(state.step), anew, still)
        held = {name: gather(x, layers[name]) for name, x in w.items()}
        masters = {name: _where(fresh[name], held[name].astype(jnp.float32), m) for name, m in state.masters.items()}
        first = {name: _where(fresh[name], held[name], x) for name, x in state.first.items()}
        age = {name: jnp.where(fresh[name], 0, n) + 1 for name, n in state.age.items()}
        active = _swap(params, masters)
        inner = _begun(state.inner, tx.init(active), fresh)
        of_slots = {name: gather(x, layers[name]).astype(jnp.float32) for name, x in g.items()}
        updates, inner = tx.update(_swap(grads, of_slots), inner, active)
        step = state.step + 1
        for name, u in stacks(updates).items():
            masters[name] = masters[name] + u * _expand(correction(age[name], step, optim), u)
        new = {name: scatter(x, layers[name], masters[name]) for name, x in w.items()}
        updates = _swap(updates, {name: _difference(new[name], x) for name, x in w.items()})
        return updates, BlockState(inner, step, memory, layers, age, masters, first)

    return optax.GradientTransformation(init, update)


def gather(x: Array, layers_S: Array) -> Array:
    """The layers of a stack that are in its slots, zeros in empty ones."""
    return x.at[layers_S].get(mode="fill", fill_value=0)


def scatter(x: Array, layers_S: Array, slots: Array) -> Array:
    """The stack with its slots written back, in its own dtype."""
    return x.at[layers_S].set(slots.astype(x.dtype), mode="drop")


def assign(layers_S: Array, chosen_L: Array, restart: bool) -> tuple[Array, Array]:
    """Slots for the layers that are chosen: those that have one keep it, others take those that are free.

    Returns: which layer each slot holds, L for none; and which slots begin anew.

    >>> layers_S, fresh_S = assign(jnp.array([1, 2, 4]), jnp.array([True, False, True, False]), restart=False)
    >>> layers_S.tolist(), fresh_S.tolist()
    ([0, 2, 4], [True, False, True])
    """
    L = chosen_L.size
    stays_S = (layers_S < L) & chosen_L[jnp.minimum(layers_S, L - 1)] & (not restart)
    kept_L = jnp.zeros(L, bool).at[jnp.where(stays_S, layers_S, L)].set(True, mode="drop")
    new_L = chosen_L & ~kept_L
    order_L = jnp.argsort(~new_L, stable=True)
    nth_S = jnp.cumsum(~stays_S) - 1  # of the free slots
    taken_S = jnp.where(nth_S < jnp.sum(new_L), order_L[jnp.clip(nth_S, 0, L - 1)], L)
    return jnp.where(stays_S, layers_S, taken_S).astype(jnp.int32), ~stays_S


def active(layers_S: Array, L: int) -> Array:
    """Which of L layers have a slot, bool."""
    return jnp.zeros(L, bool).at[layers_S].set(True, mode="drop")


def correction(age_S: Array, step: Array, optim: Optim) -> Array:
    """What Adam's update of a slot is multiplied by, because Adam counts all steps and the slot only its own.

    Adam divides its averages by 1 − βᵗ to make up for their start at zero. In a slot that began anew they are smaller
    than t steps would make them, and without this its first updates would be several times too large.
    """
    if optim.name not in ("adamw", "adamw8bit"):
        return jnp.ones(age_S.shape)

    def missing(beta: float) -> Array:
        return (1 - beta ** step.astype(jnp.float32)) / (1 - beta ** age_S.astype(jnp.float32))

    return missing(optim.beta1) / jnp.sqrt(missing(optim.beta2))


def found(state: Tree) -> BlockState:
    """The part of an optimiser's state that says who trains."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, BlockState))
    return next(x for x in leaves if isinstance(x, BlockState))


def _begun(state: Tree, empty: Tree, fresh: Stacks) -> Tree:
    """An optimiser's state with that of fresh slots as `empty` has it."""

    def one(path: tuple, old: Array, new: Array) -> Array:
        name = owner(path_name(path), fresh)
        if name is None or old.ndim == 0 or old.shape[0] != fresh[name].size:
            return old
        return _where(fresh[name], new, old)

    return jax.tree_util.tree_map_with_path(one, state, empty)


def _swap(tree: Tree, other: Stacks) -> Tree:
    return jax.tree_util.tree_map_with_path(lambda p, x: other.get(path_name(p), x), tree)


def _difference(new: Array, old: Array) -> Array:
    """In float32, so that old + (new − old) is new in bfloat16 too."""
    return new.astype(jnp.float32) - old.astype(jnp.float32)


def _expand(x_S: Array, like: Array) -> Array:
    return x_S.reshape(-1, *(1,) * (like.ndim - 1))


def _where(which_S: Array, x: Array, y: Array) -> Array:
    return jnp.where(_expand(which_S, y), x, y)


def _squares(x: Array) -> Array:
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim)))
