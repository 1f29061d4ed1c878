"""On-policy distillation: batches in which the student answers itself, and the teacher says what it thinks of that.

As in GKD (Agarwal et al., 2024, https://arxiv.org/abs/2306.13649): of each text of a batch the prompt stays, and what
the data answers is replaced by a sample of the student, no longer than that was, so rows keep their layout. Nothing is
differentiated through the sampling. A sample follows from the run's seed, the step and the prompt, so a run that is
resumed draws the same.

Dimensions: B rows of a batch, T time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune.data import encode
from jaxtune.data.batches import Batch
from jaxtune.generate import Generation, Generator
from jaxtune.hf import tokenizer
from jaxtune.job import Job
from jaxtune.objectives.distill import OWN
from jaxtune.sampling import Sampling
from jaxtune.training import State
from jaxtune.tuning import method as tuning_method

Source = Callable[[int, State, Batch], Batch]


def is_own(n: int, share: float) -> bool:
    """Whether step `n`, from 1, is one of the share of steps whose answers are the student's own; these are spread
    evenly.

    >>> [n for n in range(1, 9) if is_own(n, 0.25)]
    [4, 8]
    """
    return int(n * share + 1e-9) > int((n - 1) * share + 1e-9)


class Turn(NamedTuple):
    """A text within a batch."""

    row: int
    start: int  # of the text
    answer: int  # where its answer starts
    stop: int  # of the text


def turns(columns: dict[str, np.ndarray], documents: bool) -> list[Turn]:
    """The texts of a batch that have a prompt and room for an answer.

    An answer begins at the first token that is trained on; of documents, the first half is the prompt.
    """
    out = []
    for row, (segment_T, mask_T) in enumerate(zip(columns["segment_BT"], columns["loss_mask_BT"], strict=True)):
        for k in range(1, int(segment_T.max()) + 1):
            at = np.flatnonzero(segment_T == k)
            start, stop = int(at[0]), int(at[-1]) + 1
            trained = at[mask_T[at] > 0]
            answer = start + (stop - start) // 2 if documents else int(trained[0]) if len(trained) else stop
            if start < answer < stop:
                out.append(Turn(row, start, answer, stop))
    return out


def replaced(batch: Batch, found: list[Turn], made: list[Generation], end: int | None) -> Batch:
    """The batch with answers in the place of the data's; where one is shorter, padding follows it.

    The loss mask is `OWN` at them: no data is learned there. `end` is the token after an answer that is finished.
    """
    columns = {name: x.copy() for name, x in batch.columns.items()}
    ids_BT, mask_BT, segment_BT = (columns[n] for n in ("ids_BT", "loss_mask_BT", "segment_BT"))
    mask_BT[mask_BT > 0] = OWN
    for t, g in zip(found, made, strict=True):
        ids = [*g.ids, *([end] if g.finish == "stop" and end is not None else [])][: t.stop - t.answer]
        until = t.answer + len(ids)
        ids_BT[t.row, t.answer : until], mask_BT[t.row, t.answer : until] = ids, OWN
        for x_BT in (ids_BT, mask_BT, segment_BT, columns["position_BT"]):
            x_BT[t.row, until : t.stop] = 0
    return batch._replace(columns=columns)


def source(job: Job) -> Source:
    """What a step learns from: the batch, or every so often the batch with answers by the student as it is then."""
    share = 0.0 if job.config.distill is None else job.config.distill.on_policy
    if not share:
        return lambda n, state, batch: batch
    b, words = job.blueprint, job.tokenizer
    ends = [*encode.turn_end(words, job.data.template), *tokenizer.eos_ids(b.folder, words)]
    model = type(b.model)(dataclasses.replace(b.model.c, remat="none", attention="xla"))

    def of(n: int, state: State, batch: Batch) -> Batch:
        if not is_own(n, share) or not (found := turns(batch.columns, job.config.objective == "pretrain")):
            return batch
        weights: Any = tuning_method.student(tuning_method.join(state.trainable, state.frozen))
        ids_BT = batch.columns["ids_BT"]
        prompts = [ids_BT[t.row, t.start : t.answer].tolist() for t in found]
        seed = int(np.random.default_rng([job.config.train.seed, n]).integers(2**31))
        room = max(t.stop - t.answer for t in found)
        with jax.set_mesh(job.mesh):
            generator = Generator(model, weights, words, sorted(set(ends)))
            made = generator.generate(prompts, Sampling(max_new_tokens=room, temperature=1.0, seed=seed))
        return replaced(batch, found, made, ends[0] if ends else None)

    return of
