"""Which training rows made a model say what it says: TracIn over the checkpoints of its run.

Dimensions: B rows, T time, N rows of the training set.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import blueprint, config, job, optim, steps
from jaxtune.checkpoint import Checkpoints
from jaxtune.data.batches import Batches, Rows
from jaxtune.data.packing import buckets
from jaxtune.errors import UserError
from jaxtune.explaining.questions import Question
from jaxtune.explaining.reader import Reader, value_of
from jaxtune.layers import Outputs, unbox
from jaxtune.models.decoder import Decoder
from jaxtune.objectives import OBJECTIVES
from jaxtune.objectives.base import next_token
from jaxtune.tuning.method import join, split
from jaxtune.weights import Array

Tree = Any
_TEXT = ("sft", "pretrain")
_HEADS = ("classification", "regression")


class Checkpoint(NamedTuple):
    """A checkpoint, and the learning rates of the steps since the one before it, added up."""

    step: int
    rate: float


class Influence(NamedTuple):
    """How much each training row lowered the loss of each question, and whose checkpoints say so."""

    score_QN: np.ndarray  # float64; above 0 the row helped
    rows: Rows
    checkpoints: list[Checkpoint]
    total: int  # rows of the training set, of which `rows` are drawn


def tracin(
    folder: Path, reader: Reader, asked: Sequence[Question], most: int, said: Callable[[str], None] = lambda text: None
) -> Influence:
    """Influence of training rows on questions — TracIn (Pruthi et al., 2020, https://arxiv.org/abs/2002.08484).

    Over checkpoints, the sum of learning rate · ⟨∇ loss(row), ∇ −log p(answer)⟩ over the parameters that train. The
    inner product with one direction is a derivative along it, so no row's gradient is ever held: a forward pass in
    forward mode gives those of a whole batch. A row's loss is the sum over its tokens, as it weighs in a step; rows are
    taken one by one, unpacked, without dropout or noise. What the optimiser makes of a gradient (Adam's scaling, clip)
    is not in it.

    Args:
      folder: of the run.
      reader: its model, for how values of questions are made.
      asked: the questions.
      most: rows of the training set; where it has more, so many are drawn by the run's seed.
      said: is told what is being done.

    Raises:
      UserError: as `trained`; or it has no checkpoint.
    """
    c = trained(folder)
    dtype = reader.model.c.dtype
    c = c.model_copy(update={"train": c.train.model_copy(update={"compute_dtype": dtype, "remat": "none"})})
    checkpoints = Checkpoints(folder / job.CHECKPOINTS, read_only=True)
    if not (found := checkpoints.steps):
        raise UserError(f"--influence: {folder} has no checkpoint; train with checkpoint.every and checkpoint.keep")
    started = job.prepare(c)
    rows, total = unpacked(started.data.rows, most, c.train.seed)
    b = started.blueprint
    model = Decoder(dataclasses.replace(b.decoder, attention="xla", remat="none"))
    with jax.set_mesh(started.mesh):
        frozen = split(unbox(blueprint.materialise(b, jax.random.key(c.train.seed))), b.labels)[1]
    rate = optim.schedule(c.optim, started.steps)
    score_QN, used = np.zeros((len(asked), len(rows))), []
    for before, step in zip([0, *found], found, strict=False):
        used.append(Checkpoint(step, float(np.sum(jax.vmap(rate)(jnp.arange(before, step))))))
        said(f"influence of {len(rows):,} rows at step {step} ({len(used)} of {len(found)} checkpoints)")
        restored, _ = checkpoints.restore(step, started.state.saved())
        trainable = restored["trainable"]
        del restored
        with jax.set_mesh(started.mesh):
            put = steps.putter(started.mesh, None)
            for q, question in enumerate(asked):
                way = _direction(model, reader.how, trainable, frozen, reader.asked(question))
                for batch in Batches(rows, reader.rows, seed=None, row_count=len(rows)):
                    dot_B = np.asarray(_dots(model, c.objective, trainable, frozen, way, put(batch)), np.float64)
                    n = (batch.rows >= 0).sum()
                    score_QN[q, batch.rows[:n]] += used[-1].rate * dot_B[:n]
    checkpoints.close()
    return Influence(score_QN, rows, used, total)


def trained(folder: Path) -> config.Config:
    """The config of a run whose rows can be followed.

    Raises:
      UserError: it is no run, or was trained in a way that is not covered.
    """
    if not (folder / job.CONFIG).exists():
        raise UserError(
            f"--influence: {folder} is no run folder; only that has checkpoints and says what it learned from"
        )
    c = config.load(folder / job.CONFIG)
    if c.objective not in (*_TEXT, *_HEADS):
        raise UserError(
            f"--influence: covers objectives {', '.join((*_TEXT, *_HEADS))}, and the run's is {c.objective}"
        )
    return c


def unpacked(rows: Rows, most: int, seed: int) -> tuple[Rows, int]:
    """A row for each example, at most so many, and how many there were."""
    n = len(rows.examples)
    taken = np.arange(n) if n <= most else np.sort(np.random.default_rng(seed).permutation(n)[:most])
    examples, origins = [rows.examples[i] for i in taken], [rows.origins[i] for i in taken]
    widths = buckets([len(e.ids) for e in examples], rows.length)
    return Rows(examples, origins, [[i] for i in range(len(examples))], widths[-1], widths), n


@functools.partial(jax.jit, static_argnames=("model", "how"))
def _direction(model: Decoder, how: str, trainable: Tree, frozen: Tree, a: Any) -> Tree:
    """The gradient of a question's loss."""
    return jax.grad(lambda t: -value_of(model, how, join(t, frozen), a).sum())(trainable)


@functools.partial(jax.jit, static_argnames=("model", "objective"))
def _dots(
    model: Decoder, objective: str, trainable: Tree, frozen: Tree, way: Tree, batch: Mapping[str, Array]
) -> Array:
    """The inner products of each row's gradient with a direction, `[B]`."""
    return jax.jvp(lambda t: losses(model, objective, join(t, frozen), batch), (trainable,), (way,))[1]


def losses(model: Decoder, objective: str, weights: Tree, batch: Mapping[str, Array]) -> Array:
    """The loss of each row, float32 `[B]`, made of what forward mode goes through."""
    out: Outputs = model.apply({"params": weights}, batch["ids_BT"], batch["segment_BT"], batch["position_BT"])[0]
    if objective in _TEXT:
        target_BT, weight_BT = next_token(batch)
        p_BTV = jax.nn.log_softmax(out.logits())
        return -(jnp.take_along_axis(p_BTV, target_BT[..., None], 2)[..., 0] * weight_BT).sum(1)

    def one(hidden_TD: Array, row: Mapping[str, Array]) -> Array:
        alone = Outputs(hidden_TD[None], out.head, out.readout)
        return OBJECTIVES[objective](alone, {k: x[None] for k, x in row.items()})[0]

    return jax.vmap(one)(out.hidden_BTD, dict(batch))
