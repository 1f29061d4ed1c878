"""Optimisers and learning-rate schedules from the config, as one optax transformation."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxtune.config import Optim
from jaxtune.errors import UserError
from jaxtune.layers import is_weight
from jaxtune.optim import groups
from jaxtune.optim.average import averaged, averaging
from jaxtune.optim.muon import scale_by_muon
from jaxtune.optim.narrow import narrowed, scale_by_adam8bit
from jaxtune.optim.offload import one_at_a_time

__all__ = ["averaged", "averaging", "knobs", "make", "one_at_a_time", "schedule"]

Tree = Any
Within = Callable[[optax.GradientTransformation, Tree], optax.GradientTransformation]
_PROJECTABLE = ("adamw", "adamw8bit", "lion", "sgd")  # act on each number by itself


def _steps(amount: float, total: int) -> int:
    """A share of all steps, or a number of steps."""
    return round(amount * total) if amount < 1 else int(amount)


def schedule(c: Optim, total: int) -> optax.Schedule:
    """Learning rate by step, from 0 to `total`.

    >>> s = schedule(Optim(learning_rate=1.0, schedule="linear", warmup=2), 10)
    >>> [round(float(s(i)), 3) for i in (0, 1, 2, 6)]
    [0.5, 1.0, 1.0, 0.5]
    """
    peak, warm = c.learning_rate, _steps(c.warmup, total)
    rest = max(1, total - warm)
    if warm >= total and warm > 0 and c.warmup >= 1:
        raise UserError(f"optim.warmup={c.warmup:g} is not shorter than the run of {total} steps")
    if c.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=c.final)
    elif c.schedule == "linear":
        after = optax.linear_schedule(peak, peak * c.final, rest)
    elif c.schedule == "wsd":
        fall = min(rest, max(1, _steps(c.decay, total)))
        after = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, peak * c.final, fall)], [rest - fall]
        )
    else:
        after = optax.constant_schedule(peak)
    if not warm:
        return after
    ramp = optax.linear_schedule(peak / warm, peak, max(1, warm - 1))  # the first step already learns
    return optax.join_schedules([ramp, after], [warm])


def knobs(c: Optim, total: int, weights: Tree, rates: Sequence[tuple[str, float]] = ()) -> dict[str, Tree]:
    """The numbers that a compiled step takes as arguments, so that other ones need no other program.

    `rate_S`, float32: the learning rate of each of the S = `total` steps, however its schedule is made. `factors`: what
    multiplies it, and the weight decay, for each weight. Arguments as of `make`.
    """
    rate = schedule(c, total)
    rate_S = jax.lax.map(lambda n: jnp.asarray(rate(n), jnp.float32), jnp.arange(total))
    factors = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), groups.factors(c, weights, rates))
    return {"rate_S": rate_S, "factors": factors}


def make(
    c: Optim,
    total: int,
    weights: Tree,
    rates: Sequence[tuple[str, float]] = (),
    within: Within | None = None,
    given: Mapping[str, Tree] | None = None,
) -> optax.GradientTransformation:
    """Clip, then the optimiser with decoupled weight decay, then the learning rate.

    Args:
      c: the config.
      total: how many steps the run has.
      weights: abstract `Weight`s of what trains, None in the place of what does not.
      rates: the method's own factors of the learning rate, by pattern on plain names; the first that matches holds.
      within: what a method puts around the optimiser's core, before decay and learning rate (GaLore's projection).
      given: its `knobs`, as arrays that are traced; where not given, they are constants.

    Raises:
      UserError: a pattern matches nothing that trains, or the optimiser does not go with the rest.
    """
    rate = schedule(c, total)
    if given is not None:
        rate = functools.partial(jax.lax.dynamic_index_in_dim, given["rate_S"], keepdims=False)
    own = groups.own(*groups.factors(c, weights, rates), None if given is None else given["factors"])
    clip = optax.clip_by_global_norm(c.clip) if c.clip else optax.identity()
    scale = _core(c, weights)
    if within is not None:
        if c.name not in _PROJECTABLE:
            raise UserError(f"optim.name={c.name} does not go with projected gradients; take {', '.join(_PROJECTABLE)}")
        scale = within(scale, weights)
    if c.name != "adamw8bit":
        scale = narrowed(scale)
    if c.name != "schedule_free":
        return optax.chain(clip, scale, own, optax.scale_by_learning_rate(rate))
    _check_schedule_free(c, weights)
    inner = optax.chain(scale, own, optax.scale_by_learning_rate(rate))
    # optax counts the steps of this rate from 1
    return optax.chain(clip, contrib.schedule_free(inner, lambda n: rate(n - 1), b1=c.beta1))


def _core(c: Optim, weights: Tree) -> optax.GradientTransformation:
    """What makes a direction of a gradient."""
    if c.name == "adamw":
        return optax.scale_by_adam(c.beta1, c.beta2, c.eps)
    if c.name == "adamw8bit":
        return scale_by_adam8bit(c.beta1, c.beta2, c.eps)
    if c.name == "lion":
        return optax.scale_by_lion(c.beta1, c.beta2)
    if c.name == "sgd":
        return optax.trace(c.beta1) if c.beta1 else optax.identity()
    if c.name == "muon":
        return scale_by_muon(weights, optax.scale_by_adam(c.beta1, c.beta2, c.eps))
    if c.name == "schedule_free":  # Defazio et al., 2024: Adam without its first moment, which the average replaces
        return optax.scale_by_rms(c.beta2, c.eps, eps_in_sqrt=False, bias_correction=True)
    return optax.chain(  # Shazeer & Stern, 2018, without its own learning rate
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
    )


def _check_schedule_free(c: Optim, weights: Tree) -> None:
    if c.schedule != "constant":
        raise UserError(f"optim.schedule={c.schedule}: schedule_free does without; set optim.schedule=constant")
    if c.beta1 == 0:
        raise UserError("optim.beta1=0: schedule_free interpolates by it; set it to 0.9 or so")
    if any(w.value.dtype == jnp.bfloat16 for w in jax.tree.leaves(weights, is_leaf=is_weight)):
        raise UserError(
            "optim.name=schedule_free averages by steps that bfloat16 loses, and weights train in it here; set "
            "train.param_dtype=float32, or another optimiser"
        )
