"""The training step of a job, compiled, and how batches are put before it.

Dimensions: A micro-batches of a step, R rows of a batch, B rows of a micro-batch, T time, N devices.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import config, distributed, optim, sharding, teacher
from jaxtune.blueprint import Blueprint
from jaxtune.clock import Clock
from jaxtune.data.pipeline import Batch
from jaxtune.job import Job
from jaxtune.nodes.grid import Scheme, fake_quantized
from jaxtune.nodes.product import with_products
from jaxtune.objectives import OBJECTIVES, Objective
from jaxtune.training import WISHES, State, make_step

Tree = Any


def putter(
    mesh: jax.sharding.Mesh, micro: int | None, told: Callable[[], int] | None = None
) -> Callable[[Batch], Mapping[str, Any]]:
    """How a batch goes onto the mesh: `[A, B, T]` for `micro` micro-batches, `[B, T]` for None.

    Rows are added, empty ones, where B does not divide over the mesh. `told` gives this process's wishes, for a batch
    that trains where there are several processes.
    """
    shards, lead = sharding.batch_shards(mesh), 0 if micro is None else 1

    def put(batch: Batch) -> Mapping[str, Any]:
        out = {}
        for name, x_R in batch.columns.items():
            x_AB = x_R.reshape(micro or 1, -1, *x_R.shape[1:])
            x_AB = np.pad(x_AB, [(0, 0), (0, -x_AB.shape[1] % shards), *[(0, 0)] * (x_R.ndim - 1)])
            where = sharding.batch_sharding(mesh, lead, name)
            out[name] = distributed.put(x_AB if micro else x_AB[0], where)
        if told is not None and distributed.count() > 1:
            out[WISHES] = distributed.wishes(mesh, told())
        return out

    return put


def own_rows(job: Job) -> frozenset[int] | None:
    """The places of a training batch that this process lays out; None where it is alone."""
    if distributed.count() == 1:
        return None
    return sharding.own_rows(job.mesh, job.config.train.accumulation, job.config.train.batch_size, distributed.index())


class Steps:
    """The very step that trains, compiled once for each length of rows that there is."""

    def __init__(self, job: Job, longest: Any, clock: Clock) -> None:
        self.job, self._compiled = job, {job.data.train.length: longest}
        self._clock, self._last = clock, None

    def prepare(self, state: State, batches: Mapping[str, Any]) -> Any:
        """The step for batches of this length, compiled if it is the first one."""
        T = batches["ids_BT"].shape[-1]
        if T not in self._compiled:
            with self._clock.on("compile"):
                self._compiled[T] = compile_step(self.job, T)
        return self._compiled[T]

    def __call__(self, state: State, batches: Mapping[str, Any]) -> Any:
        done = self.prepare(state, batches)(state, batches)
        self._last = done[1]["loss"]
        return done

    def busy(self) -> bool:
        """Whether the devices still work on a step."""
        return self._last is not None and not self._last.is_ready()


def fresh(job: Job, trainable: Tree, frozen: Tree) -> State:
    """The state before the first step, of weights in their places."""
    where = jax.tree.map(lambda s: s.sharding, job.state.optimiser)
    optimiser = jax.jit(job.tx.init, out_shardings=where)(trainable)
    key = jax.random.key_data(jax.random.key(job.config.train.seed + 1))
    zero, key = jax.device_put((jnp.int32(0), key), sharding.replicated(job.mesh))
    return State(trainable, frozen, optimiser, zero, key)


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled step with the numbers that it takes beside state and batch, see `optim.knobs`."""

    compiled: jax.stages.Compiled
    knobs: Tree

    def __call__(self, state: State, batches: Mapping[str, Any]) -> Any:
        return self.compiled(state, batches, self.knobs)

    def as_text(self) -> Any:
        """Its optimised program."""
        return self.compiled.as_text()

    def memory_analysis(self) -> Any:
        """What the compiler says of its memory, where it says so."""
        return self.compiled.memory_analysis()


def compile_step(job: Job, length: int | None = None) -> Step:
    """The step that trains, compiled from shapes for rows of a length, the greatest where none is given."""
    compiled = lower_step(job, length).compile()
    whole = sharding.replicated(job.mesh)
    return Step(compiled, jax.tree.map(lambda x: distributed.put(np.asarray(x), whole), job.knobs()))


def lower_step(job: Job, length: int | None = None) -> jax.stages.Lowered:
    """The step that trains, before the compiler of the job's mesh has seen it."""
    c = job.config
    weight = job.blueprint.decoder.router_loss if c.train.router_loss is None else c.train.router_loss
    apply, objective = both_of(job, _products(c.train))

    def step(state: State, batches: Mapping[str, Any], knobs: Tree) -> Any:
        return make_step(
            apply, objective, job.turned(knobs), weight, job.blueprint.method.penalty, c.train.neftune,
            skip=c.train.nonfinite == "skip",
        )(state, batches)  # fmt: skip

    out = jax.tree.map(lambda s: s.sharding, job.state), sharding.replicated(job.mesh)
    whole = sharding.replicated(job.mesh)
    shapes = jax.eval_shape(job.knobs)
    knobs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)
    if c.optim.offload:
        step = optim.one_at_a_time(step, out[0])
    with jax.set_mesh(job.mesh):
        return jax.jit(step, donate_argnums=0, out_shardings=out).lower(*arguments(job, length), knobs)


def arguments(job: Job, length: int | None = None) -> tuple[State, dict[str, jax.ShapeDtypeStruct]]:
    """What the step takes, abstract: the state, and a batch of rows of a length."""
    c = job.config
    rows = c.train.batch_size // c.train.accumulation
    rows += -rows % sharding.batch_shards(job.mesh)
    lead = (c.train.accumulation, rows)
    batch = {
        name: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=sharding.batch_sharding(job.mesh, 1, name))
        for name, x in job.data.train.empty_row(length or job.data.train.length).items()
    }
    if distributed.count() > 1:
        everywhere = jax.sharding.NamedSharding(job.mesh, jax.sharding.PartitionSpec(job.mesh.axis_names))
        batch[WISHES] = jax.ShapeDtypeStruct((job.mesh.size,), jnp.int32, sharding=everywhere)
    return job.state, batch


def _products(t: config.Train) -> Callable[[Tree], Tree]:
    """Makes weights that are multiplied by as training asks."""
    if (scheme := rounding(t)) is not None:
        return lambda weights: fake_quantized(weights, scheme)
    wide = t.reduce_dtype == "float32" and t.compute_dtype != "float32"
    return lambda weights: weights if t.matmuls == "same" and not wide else with_products(weights, t.matmuls, wide)


def both_of(
    job: Job, ready: Callable[[Tree], Tree] = lambda w: w, measuring: bool = False
) -> tuple[Callable[[Tree, Mapping[str, Any]], Any], Objective]:
    """A job's model, with its teacher if it has one, as a function of all weights and a batch; and its objective.

    Args:
      job: the job.
      ready: what is done to the model's own weights before.
      measuring: whether the loss is that of the data alone.
    """
    run, c = apply_of(job.blueprint), job.config
    if (t := job.teacher) is None:
        return lambda weights, batch: run(ready(weights), batch), OBJECTIVES[c.objective]
    return teacher.lessons(t, job.blueprint, run, ready, measuring), teacher.objective(t, c.objective, measuring)


def rounding(t: config.Train) -> Scheme | None:
    """What matrices are rounded to in training, None where they are not."""
    return None if t.qat == "none" else Scheme(t.qat, t.qat_inputs)


def apply_of(b: Blueprint) -> Callable[[Tree, Mapping[str, Any]], Any]:
    """The model as a function of weights and batch."""

    def apply(weights: Tree, batch: Mapping[str, Any]) -> Any:
        return b.model.apply({"params": weights}, batch["ids_BT"], batch["segment_BT"], batch["position_BT"])[0]

    return apply
