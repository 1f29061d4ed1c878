"""Optimisers and learning-rate schedules from the config, as one optax transformation."""

import re
from typing import Any

import jax
import optax

from jaxtune.config import Optim
from jaxtune.errors import UserError
from jaxtune.weights import path_name

_UNDECAYED = re.compile(r"norm/weight$|/bias$")


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


def decayed(trainable: Any) -> Any:
    """Which leaves weight decay acts on: all but norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda p, _: not _UNDECAYED.search(path_name(p)), trainable)


def make(c: Optim, total: int) -> optax.GradientTransformation:
    """Clip, then the optimiser with decoupled weight decay, then the learning rate."""
    rate = schedule(c, total)
    decay = optax.add_decayed_weights(c.weight_decay, mask=decayed) if c.weight_decay else optax.identity()
    scale: optax.GradientTransformation
    if c.name == "adamw":
        scale = optax.scale_by_adam(c.beta1, c.beta2, c.eps)
    elif c.name == "lion":
        scale = optax.scale_by_lion(c.beta1, c.beta2)
    elif c.name == "sgd":
        scale = optax.trace(c.beta1) if c.beta1 else optax.identity()
    else:  # Shazeer & Stern, 2018, without its own learning rate
        scale = optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
        )
    clip = optax.clip_by_global_norm(c.clip) if c.clip else optax.identity()
    return optax.chain(clip, scale, decay, optax.scale_by_learning_rate(rate))
