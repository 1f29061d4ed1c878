"""State, step and loop: what happens between a batch and the next, in one sitting.

Dimensions: A micro-batches of a step, B rows of a micro-batch, T time.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune.data.pipeline import Batch
from jaxtune.distributed import SAVE, STOP
from jaxtune.guards import Guards
from jaxtune.nodes.noisy import noisy
from jaxtune.objectives import Objective
from jaxtune.tuning.method import join
from jaxtune.weights import Array, seeded

Tree = Any


class State(NamedTuple):
    """Everything that a step changes, and the frozen weights that it does not."""

    trainable: Tree
    frozen: Tree
    optimiser: Tree
    step: Any  # int32, steps taken
    key: Any  # uint32, the data of dropout's key; the same throughout, folded with the step

    def saved(self) -> dict[str, Any]:
        """What a checkpoint holds: all but the frozen weights."""
        return {k: v for k, v in self._asdict().items() if k != "frozen"}


WISHES = "wishes_N"  # a column that is not of rows, int32: what each process was told, on each of its N devices
_REPORTED = {"hits": "accuracy"}  # sums that have another name once they are means
Apply = Callable[[Tree, Mapping[str, Array]], Any]


def make_step(
    apply: Apply,
    objective: Objective,
    tx: optax.GradientTransformation,
    router_loss: float = 0.0,
    penalty: Callable[[Tree], Array] | None = None,
    neftune: float = 0.0,
    skip: bool = False,
) -> Callable[[State, Mapping[str, Array]], tuple[State, dict[str, Array]]]:
    """One optimiser step over a batch of `[A, B, T]` columns, as a pure function.

    Gradients are taken with respect to the trainable half only. Micro-batches add up sums of losses and of gradients,
    which are divided once by the number of tokens, so A × B rows weigh the same however they are cut.
    `router_loss` is the weight of the load-balancing loss of a mixture of experts, taken for each micro-batch.
    `penalty` is a function of the weights that is added to the mean loss, and not to the loss that is reported.
    `neftune` is the alpha of NEFTune's noise on the embeddings.
    `skip`: where the loss or the gradient is not finite, weights and optimiser stay, bit by bit; the step counts.
    """

    def loss(trainable: Tree, frozen: Tree, batch: Mapping[str, Array], key: Array) -> tuple[Array, tuple]:
        weights = join(trainable, frozen)
        outputs = apply(seeded(noisy(weights, neftune), key), batch)
        loss_sum, count, metrics = objective(outputs, batch)
        total = loss_sum
        if (balance := getattr(outputs, "balance", None)) is not None:
            metrics = {**metrics, "router_balance": balance * count}
            total = loss_sum + router_loss * balance * count
        if penalty is not None:
            total = total + penalty(weights) * count
        return total, (loss_sum, count, metrics)

    def step(state: State, batches: Mapping[str, Array]) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        batches = dict(batches)
        wishes_N = batches.pop(WISHES, None)
        A = batches["ids_BT"].shape[0]

        def micro(i: Array, batch: Mapping[str, Array]) -> tuple[Tree, tuple]:
            grad = jax.value_and_grad(loss, has_aux=True)
            (_, sums), grads = grad(state.trainable, state.frozen, batch, jax.random.fold_in(key, i))
            return grads, sums

        if A == 1:
            sums = micro(jnp.int32(0), {k: v[0] for k, v in batches.items()})
        else:

            def body(sums: Tree, x: tuple) -> tuple[Tree, None]:
                return jax.tree.map(jnp.add, sums, micro(*x)), None

            first = jax.eval_shape(micro, jnp.int32(0), {k: v[0] for k, v in batches.items()})
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)
            sums, _ = jax.lax.scan(body, zeros, (jnp.arange(A), batches))
        grads, (loss_sum, count, metrics) = sums
        count = jnp.maximum(count, 1.0)
        grads = jax.tree.map(lambda g: (g / count).astype(g.dtype), grads)  # bfloat16 ones stay so
        updates, optimiser = tx.update(grads, state.optimiser, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        report = {"loss": loss_sum / count, "grad_norm": optax.tree.norm(grads), "tokens": count}
        report |= {_REPORTED.get(name, name): total / count for name, total in metrics.items()}
        if wishes_N is not None:
            report[WISHES] = (wishes_N & STOP).max() | (wishes_N & SAVE).max()
        if skip:
            finite = jnp.isfinite(report["loss"]) & jnp.isfinite(report["grad_norm"])
            new, old = (trainable, optimiser), (state.trainable, state.optimiser)
            trainable, optimiser = jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)
        return State(trainable, state.frozen, optimiser, state.step + 1, state.key), report

    return step


class Hooks(NamedTuple):
    """What the loop calls on its way; what gets an `n` gets the number of steps taken."""

    log: Callable[[int, dict[str, float], Batch], None]
    evaluate: Callable[[int, State], None]
    save: Callable[[int, State], None]
    stop: Callable[[], bool]  # whether to save and leave after this step
    save_now: Callable[[], bool] = lambda: False  # whether to save after this step and go on
    note: Callable[[int, dict[str, float]], None] = lambda n, values: None  # what is odd about a step
    back: Callable[[int, State], State] = lambda n, state: state  # to the last checkpoint's weights; `state` is used up
    source: Callable[[int, State, Batch], Batch] = lambda n, state, batch: batch  # the batch to take: the one edge that
    # leads back from weights to data


class Every(NamedTuple):
    """Steps between evaluations and between checkpoints."""

    evaluate: int
    save: int


def loop(
    state: State,
    step: Callable[[State, Mapping[str, Array]], tuple[State, dict[str, Array]]],
    batches: Iterator[Batch],
    put: Callable[[Batch], Mapping[str, Array]],
    start: int,
    total: int,
    every: Every,
    hooks: Hooks,
    where: Callable[[Batch], list[str]],
    guards: Guards | None = None,
) -> tuple[State, int]:
    """Take steps `start` to `total`. A step is dispatched before the last one's numbers are fetched.

    Where there are several processes, each puts what it was told into its batches (see `distributed.wishes`), and all
    act upon what a step reports of it, at the same step.

    Returns: the last state, and how many steps it has taken (fewer than `total` if `hooks.stop` said so).

    Raises:
      UserError: a loss or gradient is not finite and `guards` says stop; names the step and the rows. What was saved
        before stays.
    """
    guards = guards or Guards()
    pending: tuple[int, dict[str, Array], Batch] | None = None
    agreed = 0  # what the processes were told, together

    def settle() -> bool:
        """Look at the numbers that are on their way; False if the state went back for them."""
        nonlocal pending, agreed, state
        if pending is None:
            return True
        n, report, batch = pending
        pending = None
        values = {k: float(v) for k, v in jax.device_get(report).items()}
        agreed |= int(values.pop(WISHES, 0))
        if guards.finite(n, values, where(batch)):
            hooks.log(n, values, batch)
            if (above := guards.spike(n, values["loss"], where(batch))) is not None:
                hooks.note(n, {"spike": above, "spike_loss": values["loss"]})
            return True
        hooks.note(n, {guards.nonfinite: 1.0})
        if guards.nonfinite == "rollback":
            state = hooks.back(n, state)
        return guards.nonfinite != "rollback"

    for n in range(start + 1, total + 1):
        batch = hooks.source(n, state, next(batches))
        state, report = step(state, put(batch))
        if settle():
            pending = n, report, batch  # else this step was taken from weights that are undone
        together = WISHES in report
        stopping = bool(agreed & STOP) if together else hooks.stop()
        asked = bool(agreed & SAVE) if together else hooks.save_now()
        saving = stopping or n == total or n % every.save == 0 or asked
        if saving or n == start + 1 or n % every.evaluate == 0:
            settle()  # the first step is told at once, and nothing is saved before its loss is known to be finite
        if n == total or (n % every.evaluate == 0 and not stopping):
            hooks.evaluate(n, state)
        if saving:
            hooks.save(n, state)
            agreed &= ~SAVE
        if stopping:
            return state, n
    return state, total
