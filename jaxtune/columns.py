"""What a teacher says of every token of a data set, written down once: its likeliest tokens, as columns of batches.

Files appear whole. A run that is killed on the way goes on where it was; another run of the same teacher, data, number
of tokens and temperature finds them.

Dimensions: B batch, T time, V vocab, D embed, K the likeliest tokens, and the rest.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import blueprint, distributed, log
from jaxtune.attention import NEVER
from jaxtune.data.batches import Batches, Beside, Rows
from jaxtune.errors import Interrupted, UserError
from jaxtune.hf import files
from jaxtune.job import Job
from jaxtune.layers import Outputs, unbox
from jaxtune.objectives import base
from jaxtune.objectives.distill import IDS, LOGP
from jaxtune.steps import apply_of, putter
from jaxtune.teacher import Teacher
from jaxtune.weights import Array, platform

Tree = Any
_LEAST = -30.0  # log-probability of a rest that is none
_EVERY = 50  # batches between notes of how far it is
_DONE = "done"


def missing(job: Job) -> list[tuple[str, Rows, Beside]]:
    """Columns of a job that are not there yet: of what, of which rows, and where they will be."""
    if job.teacher is None or job.teacher.live:
        return []
    sets = [("train", job.data.train), ("validation", job.data.validation)]
    found = [(name, rows, rows.beside) for name, rows in sets if isinstance(rows, Rows) and rows.beside is not None]
    left = {x[2].folder: x for x in found if x[2].folder is not None and not x[2].folder.exists()}
    return list(left.values())  # once, where the same rows are held out as are trained on


def check_disk(job: Job) -> int:
    """Bytes of the columns that are to be written.

    Raises:
      UserError: they do not fit on the disk.
    """
    need = 0
    for name, rows, beside in missing(job):
        assert beside.folder is not None
        need += (this := beside.nbytes(rows.tokens))
        free = shutil.disk_usage(next(p for p in beside.folder.absolute().parents if p.exists())).free
        if need > free:
            raise UserError(
                f"{beside.folder.parent}: the teacher's columns for {name} need {log.size(this)}, {log.size(free)} are "
                "free; make room, lower distill.top_k, or name another folder as distill.columns"
            )
    return need


def write(job: Job, stop: Callable[[], bool] = lambda: False) -> None:
    """Write the columns of a job that are not there yet.

    Raises:
      UserError: they do not fit on the disk, or there are several processes.
      Interrupted: told to stop; what is written stays, and is gone on with.
    """
    if not (left := missing(job)):
        return
    assert job.teacher is not None
    if distributed.count() > 1:
        raise UserError(
            "distill.top_k: the teacher's columns are written by one process, and there are several; leave top_k out, "
            "or begin the run in one process with distill.columns on storage of all"
        )
    check_disk(job)
    weights = unbox(blueprint.materialise(job.teacher.blueprint, jax.random.key(0)))
    k, t = job.teacher.c.top_k or 0, job.teacher.c.temperature
    for name, rows, beside in left:
        log.say(
            f"{name}: writes the teacher's {k} likeliest tokens for {rows.tokens:,} tokens, "
            f"{log.size(beside.nbytes(rows.tokens))}, to {beside.folder}"
        )
        size = job.config.evaluate.batch_size or job.config.train.batch_size // job.config.train.accumulation
        _write(job.teacher, weights, rows, beside, size, t, job.mesh, stop)


def _write(
    teacher: Teacher,
    weights: Tree,
    rows: Rows,
    beside: Beside,
    size: int,
    temperature: float,
    mesh: jax.sharding.Mesh,
    stop: Callable[[], bool],
) -> None:
    assert beside.folder is not None
    run, vocab, k = apply_of(teacher.blueprint), teacher.blueprint.decoder.vocab, teacher.c.top_k or 0

    @jax.jit
    def find(weights: Tree, batch: Mapping[str, Array]) -> tuple[Array, Array]:
        return likeliest(run(weights, batch), k, vocab, temperature)

    put, plain = putter(mesh, None), dataclasses.replace(rows, beside=None)
    about = {"columns": beside.folder.name, "batch": size}
    with files.resumable(beside.folder, about) as folder, log.Progress(beside.nbytes(rows.tokens)) as bar:
        out = {name: _array(folder / f"{name}.npy", (rows.tokens, *s), d) for name, (s, d) in beside.columns.items()}
        done = int((folder / _DONE).read_text()) if (folder / _DONE).exists() else 0
        for n, batch in enumerate(Batches(plain, size, seed=None, row_count=len(rows)), 1):
            bar.add(beside.nbytes(batch.tokens))
            if n <= done:
                continue
            found = {name: np.asarray(x) for name, x in zip((IDS, LOGP), find(weights, put(batch)), strict=True)}
            for b, i in enumerate(batch.rows.tolist()):
                at = 0
                for e in rows.rows[i] if i >= 0 else ():
                    here = slice(rows.starts[e], rows.starts[e + 1])
                    length = len(rows.examples[e].ids)
                    for name, x in found.items():
                        out[name][here] = x[b, at : at + length]
                    at += length
            if n % _EVERY == 0 or (asked := stop()):
                for x in out.values():
                    x.flush()
                log.write_whole(folder / _DONE, str(n))
                if n % _EVERY and asked:
                    raise Interrupted(f"{beside.folder}: stopped on the way; run the same command again to go on")
        for x in out.values():
            x.flush()
        (folder / _DONE).unlink(missing_ok=True)


def _array(file: Path, shape: tuple[int, ...], dtype: str) -> np.memmap:
    if file.exists():
        return np.load(file, mmap_mode="r+")
    return np.lib.format.open_memmap(file, "w+", np.dtype(dtype), shape)


def likeliest(outputs: Outputs, k: int, vocab: int, temperature: float) -> tuple[Array, Array]:
    """Ids `[B, T, k]` of the likeliest of the first `vocab` tokens, and log-probabilities `[B, T, k + 1]` at a
    temperature, float16; the last is that of all others together. No more than a chunk's logits are held."""
    B, T = outputs.hidden_BTD.shape[:2]

    def one(hidden_BD: Array) -> tuple[Array, Array]:
        logp_BV = jax.nn.log_softmax(outputs.logits(hidden_BD[:, None])[:, 0, :vocab] / temperature)
        top_BK, id_BK = jax.lax.top_k(logp_BV, k)
        chosen_BV = jnp.put_along_axis(jnp.zeros(logp_BV.shape, bool), id_BK, True, -1, inplace=False)
        rest_B1 = jax.nn.logsumexp(jnp.where(chosen_BV, NEVER, logp_BV), -1, keepdims=True)
        return id_BK, jnp.concatenate([top_BK, jnp.maximum(rest_B1, _LEAST)], -1).astype(jnp.float16)

    at_once = int(np.clip(base.LOGITS_BYTES[platform()] // (B * vocab * 4), 1, T))
    found = jax.lax.map(one, jnp.moveaxis(outputs.hidden_BTD, 1, 0), batch_size=at_once)
    id_BTK, logp_BTK = (jnp.moveaxis(x, 0, 1) for x in found)
    return id_BTK.astype(jnp.uint16 if vocab <= 2**16 else jnp.int32), logp_BTK
