"""AdaLoRA: adapters in SVD form whose ranks are spread by importance within a shrinking budget.

Importance, budget and masks are those of peft's `RankAllocator`, as an optax transformation around the optimiser: the
shapes stay what they are, and a triplet is dropped by its singular value being zero.

Dimensions: in… and out… are a weight's contracted and remaining axes, r is the rank.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtune.config import AdaLora
from jaxtune.errors import UserError
from jaxtune.layers import Weight, group_name, plain_names
from jaxtune.models.decoder import DecoderConfig
from jaxtune.nodes.adalora import AdaLoRA, folded
from jaxtune.nodes.lora import LoRA
from jaxtune.tuning.lora import targetable
from jaxtune.tuning.method import FROZEN, TRAIN, Method, Training, covering, decoder_names
from jaxtune.weights import Array, is_node, path_name

Tree = Any
_WEIGHT = "/weight"
_DEVIATION = 0.02  # of A and B at first, as in peft
_EPS = 1e-5  # added to the rank that alpha is divided by, as in peft


def method(tuning: AdaLora, decoder: DecoderConfig, training: Training) -> Method:
    """Adapters in SVD form on what `tuning.targets` names, with ranks that the optimiser's state holds.

    Raises:
      UserError: a pattern matches nothing, or experts; or the schedule leaves no step in which ranks shrink.
    """
    patterns = [r"^layers/"] if tuning.targets == "all-linear" else tuning.targets
    patterns = [patterns] if isinstance(patterns, str) else patterns
    names = [n for n in decoder_names(decoder) if targetable(n)]
    covering(patterns, [n.removesuffix(_WEIGHT) for n in names], "tuning.targets")
    mine = {n for n in names if any(re.search(p, n.removesuffix(_WEIGHT)) for p in patterns)}
    if taken := sorted(n for n in mine if "/experts/" in n):
        raise UserError(
            f"tuning.targets matches {taken[0]}: AdaLoRA is not for experts; narrow it, e.g. to [self_attn], or take "
            "tuning.method=lora"
        )
    if training.optim.name == "schedule_free":
        raise UserError("tuning.method=adalora with optim.name=schedule_free is not supported; take adamw")
    if training.train.ema:
        raise UserError(
            "tuning.method=adalora with train.ema is not supported: an average keeps ranks that were dropped; leave it "
            "out"
        )
    schedule = Schedule.of(tuning, training.steps, len(mine))

    def wrap(name: str, w: Weight, key: Array) -> Weight | AdaLoRA:
        return adapter(w, tuning, key) if name in mine else w

    return Method(
        wrap,
        [(r"/(a|b|e)$", TRAIN), ("", FROZEN)],
        base=None if tuning.base is None else (tuning.base, tuning.group),
        around=lambda tx: allocating(tx, tuning, schedule, training.optim.clip),
        penalty=lambda weights: tuning.orthogonal * askew(weights),
        choice=ranks,
    )


def adapter(w: Weight, tuning: AdaLora, key: Array) -> AdaLoRA:
    """A fresh adapter: A and B normal with deviation 0.02 as in peft, singular values zero, so nothing changes."""
    s, r, shape, axes = w.lead, tuning.init_rank, w.value.shape, w.names
    to_a, to_b = jax.random.split(key)
    a = _DEVIATION * jax.random.normal(to_a, (*shape[: s + w.n_in], r), jnp.float32)
    b = _DEVIATION * jax.random.normal(to_b, (*shape[:s], r, *shape[s + w.n_in :]), jnp.float32)
    return AdaLoRA(
        w,
        Weight(a, (*axes[: s + w.n_in], "rank"), n_in=w.n_in),
        Weight(b, (*axes[:s], "rank", *axes[s + w.n_in :]), n_in=1),
        scale=tuning.alpha / (r + _EPS),
        dropout=tuning.dropout,
        e=Weight(jnp.zeros((*shape[:s], r), jnp.float32), (*axes[:s], "rank")),
    )


def _adapters(tree: Tree) -> dict[str, AdaLoRA]:
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_node)
    return {path_name(p): w for p, w in nodes if isinstance(w, AdaLoRA)}


def askew(weights: Tree) -> Array:
    """How far singular vectors are from orthogonal: the mean of ‖AᵀA − I‖ and ‖BBᵀ − I‖ over all matrices, a scalar."""
    norms = []
    for w in _adapters(weights).values():
        r = w.e.shape[-1]
        a = w.a.reshape(-1, w.a.size // w.e.size, r)  # layers in front, one where nothing is stacked
        b = w.b.reshape(-1, r, w.b.size // w.e.size)
        for eqn, x in (("lir,lis->lrs", a), ("lro,lso->lrs", b)):
            x = x.astype(jnp.float32)
            off = jnp.einsum(eqn, x, x, precision="highest") - jnp.eye(r)
            norms.append(jnp.sqrt(jnp.sum(off**2, axis=(1, 2))))
    return jnp.mean(jnp.concatenate(norms))


class Schedule(NamedTuple):
    """When ranks are spread anew, and how many there are then in all. Steps count from 1."""

    warmup: int  # after this many steps ranks begin to go
    end: int  # the step of the last reallocation
    every: int
    first: int  # ranks of all adapters at first
    last: int  # and at the end

    @staticmethod
    def of(tuning: AdaLora, steps: int, adapters: int) -> "Schedule":
        """Raises: UserError: no step is left in which ranks shrink."""
        warmup, final = (round(x * steps) if x < 1 else int(x) for x in (tuning.warmup, tuning.final))
        if warmup >= steps - final:
            raise UserError(
                f"tuning.warmup={tuning.warmup:g} and tuning.final={tuning.final:g} leave no step of {steps} in which "
                "ranks shrink; lower them or raise train.steps"
            )
        return Schedule(warmup, steps - final, tuning.every, tuning.init_rank * adapters, tuning.rank * adapters)

    def budget(self, n: int) -> int:
        """Ranks of all adapters after step `n`: they fall with the cube of the time that is left.

        >>> [Schedule(2, 10, 1, 120, 80).budget(n) for n in (1, 2, 3, 6, 10, 12)]
        [120, 120, 106, 85, 80, 80]
        """
        left = min(max((self.end - n) / (self.end - self.warmup), 0), 1)
        return int((self.first - self.last) * left**3 + self.last)


class AdaLoraState(NamedTuple):
    """Of the optimiser inside, and of the allocation."""

    inner: Tree
    step: Array  # int32, steps taken
    sensitivity: Tree  # |weight · gradient|, smoothed, as the weights are shaped
    uncertainty: Tree  # its deviation, smoothed
    keep: dict[str, Array]  # by adapter, which triplets are left; bool, shaped as `e`


def allocating(
    tx: optax.GradientTransformation, tuning: AdaLora, schedule: Schedule, clip: float
) -> optax.GradientTransformation:
    """`tx`, with the least important triplets' singular values set to zero as the budget shrinks.

    Importance goes by the weights after the step and the gradients, clipped to `clip`, that made it.
    """
    clipped = optax.clip_by_global_norm(clip) if clip else optax.identity()
    s, every = schedule, schedule.every
    budgets = np.array([s.budget(i * every) for i in range(s.end // every + 1)], np.int32)

    def init(params: Tree) -> AdaLoraState:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        keep = {name: jnp.ones(w.e.shape, bool) for name, w in _adapters(params).items()}
        return AdaLoraState(tx.init(params), jnp.int32(0), zeros, zeros, keep)

    def update(grads: Tree, state: AdaLoraState, params: Tree | None = None) -> tuple[Tree, AdaLoraState]:
        assert params is not None
        updates, inner = tx.update(grads, state.inner, params)
        n = state.step + 1
        grads, _ = clipped.update(grads, clipped.init(params))

        def smoothed(beta: float, old: Tree, new: Tree) -> Tree:
            return jax.tree.map(lambda x, y: jnp.where(n < s.end, beta * x + (1 - beta) * y, x), old, new)

        now = jax.tree.map(lambda p, g: jnp.abs(p * g), optax.apply_updates(params, updates), grads)
        sensitivity = smoothed(tuning.beta1, state.sensitivity, now)
        surprise = jax.tree.map(lambda x, y: jnp.abs(x - y), now, sensitivity)
        uncertainty = smoothed(tuning.beta2, state.uncertainty, surprise)
        due = ((n > s.warmup) & (n < s.end) & (n % every == 0)) | (n == s.end)
        budget = jnp.where(n == s.end, s.last, jnp.asarray(budgets)[jnp.minimum(n // every, len(budgets) - 1)])
        both = jax.tree.map(jnp.multiply, sensitivity, uncertainty)
        score = {name: triplets(w) for name, w in _adapters(both).items()}
        ranked, gone = jnp.sort(jnp.concatenate([x.ravel() for x in score.values()])), s.first - budget
        least = jnp.where(gone > 0, ranked[gone - 1], -1.0)
        keep = {name: jnp.where(due, score[name] > least, old) for name, old in state.keep.items()}

        def masked(path: tuple, u: Any, p: Any) -> Any:
            if not isinstance(u, AdaLoRA):
                return u
            zero = (due | (n > s.end)) & ~keep[path_name(path)]
            return dataclasses.replace(u, e=jnp.where(zero, -p.e, u.e))

        updates = jax.tree_util.tree_map_with_path(masked, updates, params, is_leaf=is_node)
        return updates, AdaLoraState(inner, n, sensitivity, uncertainty, keep)

    return optax.GradientTransformation(init, update)


def triplets(w: AdaLoRA) -> Array:
    """The importance of each triplet from that of its numbers: e's, and the means of a's column and of b's row."""
    lead = w.e.ndim - 1
    of_a = jnp.mean(w.a, axis=tuple(range(lead, w.a.ndim - 1)))
    of_b = jnp.mean(w.b, axis=tuple(range(lead + 1, w.b.ndim)))
    return w.e + of_a + of_b


def ranks(state: Tree) -> dict[str, Array]:
    """The rank that is left of each adapter, by the weight's plain name, from the optimiser's state."""
    found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, AdaLoraState))
    keep = next(x for x in found if isinstance(x, AdaLoraState)).keep
    out: dict[str, Array] = {}
    for path, kept in keep.items():
        left = jnp.sum(kept, axis=-1).reshape(-1)
        out |= {name.removesuffix(_WEIGHT): left[i] for i, name in enumerate(plain_names(path))}
    return out


def as_lora(adapted: Mapping[str, tuple[Weight, Any]]) -> dict[str, tuple[Weight, Any]]:
    """Nodes by path, with a plain LoRA of the ranks that are left for each layer of an AdaLoRA; other nodes stay.

    The scale stays what it was. Layers of which no rank is left are left out.

    Raises:
      UserError: no rank is left at all.
    """
    out: dict[str, tuple[Weight, Any]] = {}
    for path, (w, node) in adapted.items():
        if not isinstance(node, AdaLoRA):
            out[path] = w, node
            continue
        for i, plain in enumerate(plain_names(path)):
            at = (slice(i, i + 1) if w.stacked else slice(None),)
            a, e, b = (np.asarray(x.value[at], np.float32) for x in (node.a, node.e, node.b))
            left = np.flatnonzero(e)
            if not left.size:
                continue
            axis = w.lead  # of the rank in b
            own = folded(AdaLoRA(None, a[..., left], np.take(b, left, axis), scale=node.scale, e=e[..., left]))
            one = w.like(jax.ShapeDtypeStruct((*a.shape[:axis], *w.value.shape[axis:]), w.value.dtype))
            out[_alone(plain)] = one, LoRA(one, node.a.like(own.a), node.b.like(own.b), scale=node.scale)
    if adapted and not out:
        raise UserError("AdaLoRA: no rank is left, all scores were equal; raise tuning.rank or train.steps")
    return out


def _alone(plain: str) -> str:
    """The path of a layer's weight in a group of one."""
    if not plain.startswith("layers/"):
        return plain
    _, i, rest = plain.split("/", 2)
    return f"{group_name(int(i), 1)}/{rest}"
