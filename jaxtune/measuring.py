"""How a run's weights are measured on its validation set: the objective's loss, a head's task, a task's answers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxtune import evaluate, head_scores, scoring, sharding
from jaxtune.data import encode, pipeline
from jaxtune.data import heads as data_heads
from jaxtune.generate import Generator
from jaxtune.hf import tokenizer
from jaxtune.job import Job
from jaxtune.nodes.grid import fake_quantized
from jaxtune.steps import apply_of, both_of, putter, rounding
from jaxtune.tuning import method as tuning_method

Tree = Any


def make(job: Job) -> Callable[[Tree], dict[str, float]]:
    """A function of all weights that gives scores by name, always with `loss`. The job has a validation set.

    With a teacher, `loss` is that of the data all the same, and `kl` says how far the model is from the teacher.
    """
    c, held = job.config, job.data.validation
    apply, put = apply_of(job.blueprint), putter(job.mesh, None)
    scheme = rounding(c.train)

    def own(weights: Tree) -> Tree:
        """As they are exported."""
        return weights if scheme is None else fake_quantized(weights, scheme)

    sums = jax.jit(evaluate.make_sums(*both_of(job, own, measuring=True)))
    size = c.evaluate.batch_size or c.train.batch_size // c.train.accumulation
    head = job.blueprint.decoder.task
    whole = sharding.replicated(job.mesh)  # each process reads all of it
    logits = jax.jit(head_scores.make_logits(apply, head.kind), out_shardings=whole) if head is not None else None

    def measure(weights: Tree) -> dict[str, float]:
        if held is None:
            raise ValueError("there is no validation set to measure on")
        values = evaluate.scores(sums, weights, held, size, put)
        if head is not None and logits is not None:
            found = head_scores.outputs(logits, own(weights), held, size, put, head.kind)
            s = pipeline.head_settings(c.data, head.kind, head.labels, head.multi)
            scores, _ = head_scores.evaluate(s, job.tokenizer, data_heads.records(job.data.held, head.kind), found)
            return {"loss": values["loss"], **scores.values}
        if c.evaluate.task is not None:  # its accuracy is another than that of tokens
            values["token_accuracy"] = values.pop("accuracy")
            values |= answered(job, own(tuning_method.student(weights)), size)
        return values

    return measure


def answered(job: Job, weights: Tree, batch_size: int) -> dict[str, float]:
    """The scores of `evaluate.task`."""
    c, b = job.config, job.blueprint
    eos = {*tokenizer.eos_ids(b.folder, job.tokenizer), *encode.turn_end(job.tokenizer, job.data.template)}
    model = type(b.model)(dataclasses.replace(b.model.c, remat="none", attention="xla"))
    asked = scoring.Asked(Generator(model, weights, job.tokenizer, sorted(eos)), job.data.template, batch_size)
    return scoring.in_loop(c.evaluate, c.data, job.data.held, asked)
