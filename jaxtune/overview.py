"""What is said of a job before it runs: what it trains, on what, and what it needs of memory and disk."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune import chips, columns, config, distributed, kernels, log, sharding, trackers
from jaxtune.config import DEMO, Config
from jaxtune.data import encode
from jaxtune.errors import UserError
from jaxtune.job import Job, parameters, prepare, trained
from jaxtune.layers import unbox
from jaxtune.models import pipeline
from jaxtune.tuning import method as tuning_method

Tree = Any


def introduce(job: Job, compiled: Any) -> None:
    """Say what is about to happen: one training sample, and the numbers of the run."""
    c, data, b = job.config, job.data, job.blueprint
    for remark in data.remarks:
        log.say(remark)
    first = data.train.sample
    mask = np.ones_like(first.mask) if c.objective == "pretrain" else first.mask
    text = slice(b.method.virtual, None)
    log.sample(encode.visible(job.tokenizer, first.ids[text], mask[text]))
    base, added = parameters(b)
    matching = 0 if job.teacher is None else tuning_method.count(unbox(job.teacher.matching))
    trains, all_ = trained(job), base + added + matching
    per_device = compiled.memory_analysis()
    memory = "not known here"
    if per_device is not None:
        state, rest = per_device.argument_size_in_bytes, per_device.temp_size_in_bytes
        chip = chips.of(job.mesh.devices.flat[0].device_kind)
        there = f" of {log.size(chip.memory)}" if chip is not None else ""
        parts = f"{log.size(state)} state and batch, {log.size(rest)} temporary"
        memory = f"{log.size(state + rest)}{there} per device ({parts})"
    axes = ", ".join(f"{a} {n}" for a, n in job.mesh.shape.items() if n > 1)
    log.table(
        [
            ("model", f"{c.model if c.model == DEMO else b.folder.name}: {base:,} parameters"),
            ("tuning", f"{c.tuning.method}: {trains:,} of {all_:,} train ({100 * trains / all_:.2f} %)"),
            ("layers", f"{b.decoder.layers} in groups of {', '.join(map(str, b.decoder.groups))}, "
                       f"remat {c.train.remat}"),
            *data.facts,
            *taught(job),
            ("steps", f"{job.steps:,} of {c.train.batch_size} rows"
                      + (f" in {c.train.accumulation} micro-batches" if c.train.accumulation > 1 else "")),
            ("mesh", f"{axes or 'one device'}: {job.mesh.size} × {job.mesh.devices.flat[0].device_kind}"
                     + (f" of {distributed.count()} processes" if distributed.count() > 1 else "")),
            *_pipeline(job),
            ("compute", c.train.compute_dtype),
            ("attention", _attention(job)),
            ("memory", memory),
        ]
    )  # fmt: skip


def taught(job: Job) -> list[tuple[str, str]]:
    """The teacher, where there is one, and how it teaches."""
    if (t := job.teacher) is None:
        return []
    d, size = t.c, tuning_method.count(unbox(t.blueprint.plain))
    how = f"beside the student in {log.size(held(t.blueprint.abstract))} over all devices"
    if not t.live:
        need = columns.check_disk(job)
        how = f"its {d.top_k} likeliest tokens " + (f"to be written, {log.size(need)}" if need else "are written")
    loss = f"{d.kind} divergence at temperature {d.temperature:g}, weight {d.weight:g}"
    return [("teacher", f"{t.blueprint.folder.name}: {size:,} parameters, {how}; {loss}")]


def _pipeline(job: Job) -> list[tuple[str, str]]:
    if (S := job.mesh.shape["stage"]) == 1:
        return []
    rows = job.config.train.batch_size // job.config.train.accumulation
    M = pipeline.micro_batches(-(-rows // sharding.batch_shards(job.mesh)), S)
    return [("pipeline", f"{S} stages, {M} micro-batches at a time; a stage waits {(S - 1) / (M + S - 1):.0%} of it")]


def _attention(job: Job) -> str:
    """The kernel, and why where another is made for the device."""
    c, d = job.config.train, job.blueprint.decoder
    device, past = job.mesh.devices.flat[0], job.blueprint.method.past
    name, why = kernels.kind(c.attention, device, d.head, c.compute_dtype, d.attention_softcap, past)
    if name == "cudnn":
        T = job.config.data.max_length
        why = f"its mask takes {log.size(2 * T * T)} for each row of {T:,} tokens"
    return f"{name} ({why})" if why else name


def held(tree: Tree) -> int:
    """Bytes of a tree of abstract arrays."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def check_disk(job: Job) -> tuple[int, int]:
    """Bytes that the run's checkpoints and export need, and bytes that are there for them: free, or the run's already.

    Raises:
      UserError: they do not fit.
    """
    c, b = job.config, job.blueprint
    saved = held(job.state.saved())
    whole = sum(int(np.prod(t.shape)) * t.dtype.itemsize for ts in b.tensors.values() for t in ts)
    best = 2 * held(job.state.trainable) if c.evaluate.best else 0  # the old ones go when the new are there
    exports = c.checkpoint.keep + 2 if c.checkpoint.export else 1
    adapter = isinstance(c.tuning, config.Adapter) and not getattr(c.tuning, "keep_zeros", False)
    need = best + saved * (c.checkpoint.keep + 1) + exports * (saved if adapter else whole)
    out = Path(c.output).absolute()
    free = shutil.disk_usage(next(p for p in (out, *out.parents) if p.exists())).free
    free += sum(
        f.stat().st_size
        for part in ("checkpoints", "best", "export", "exports")
        for f in (out / part).rglob("*")
        if f.is_file()
    )
    if need > free:
        raise UserError(
            f"{out}: {c.checkpoint.keep + 1} checkpoints and the export need {log.size(need)}, {log.size(free)} are "
            "free; make room, lower checkpoint.keep or choose another output"
        )
    return need, free


def validate(c: Config) -> list[tuple[str, str]]:
    """What can be checked without weights: config, files, columns, token lengths, memory, disk; as names and values.

    Raises:
      UserError: something does not fit.
    """
    trackers.check(c.track)
    job = prepare(c)
    b, data = job.blueprint, job.data
    need, free = check_disk(job)
    gradients = held(job.state.trainable)
    return [
        *[("remark", r) for r in data.remarks],
        ("model", f"{b.folder}: {tuning_method.count(unbox(b.plain)):,} parameters, "
                  "all tensors fit"),
        ("tuning", f"{c.tuning.method}: {trained(job):,} parameters train"),
        *data.facts,
        *taught(job),
        ("steps", f"{job.steps:,}"),
        ("memory", f"{log.size(held(job.state) + gradients)} for weights, optimiser and gradients over all devices; "
                   "activations come on top"),
        ("disk", f"{log.size(need)} for {c.checkpoint.keep + 1} checkpoints and the export; {log.size(free)} free"),
    ]  # fmt: skip
