"""The step of a planned job, compiled for its topology, as numbers; they are kept on disk by what they depend on."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import jax

from jaxtune import log, steps
from jaxtune.job import Job
from jaxtune.planning import reading
from jaxtune.planning.reading import Collective, Reading
from jaxtune.planning.topology import Topology, quiet

_VERSION = 3  # of what is kept


@dataclasses.dataclass(frozen=True)
class State:
    """Bytes on one device, from shapes and shardings: exact, without a compiler."""

    trained: int
    frozen: int
    optimiser: int
    batch: int

    @property
    def total(self) -> int:
        return self.trained + self.frozen + self.optimiser + self.batch


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step, for one device. Where it did not fit, there is nothing but the peak."""

    peak: float  # bytes
    fits: bool
    limit: float | None  # bytes that the compiler gives, where it says so
    temporaries: float
    reading: Reading | None
    cached: bool = False


def state(job: Job) -> State:
    """What the state and a batch take on the device that has the most."""
    _, batch = steps.arguments(job)
    return State(*(_on_device(x) for x in (job.state.trainable, job.state.frozen, job.state.optimiser, batch)))


def _on_device(tree: Any) -> int:
    """Bytes of a device's part; what is in the host's memory is none of it."""
    out = 0
    for x in jax.tree.leaves(tree):
        if getattr(x.sharding, "memory_kind", None) not in ("pinned_host", "unpinned_host"):
            out += prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return out


def step(job: Job, t: Topology, cache: bool = True) -> Compiled:
    """Compile the step that trains, or find what was said of the very same one before."""
    lowered = steps.lower_step(job)
    file = _file(lowered.as_text(), job, t)
    if cache and (known := _load(file)) is not None:
        return known
    try:
        if t.platform == "tpu":
            with quiet(), _not_kept_by_jax():
                done = lowered.compile()
        else:
            done = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        found = _refused(str(e))
        if found is None:
            raise
        _save(file, found)
        return found
    m = done.memory_analysis()
    text = done.as_text() or ""
    r = reading.read(text, dict(job.mesh.shape))
    peak = temporaries = 0.0
    if m is not None:
        temporaries = m.temp_size_in_bytes
        held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        peak = held + temporaries + m.generated_code_size_in_bytes
    found = Compiled(peak, True, None, temporaries, r)
    _save(file, found)
    return found


@contextlib.contextmanager
def _not_kept_by_jax() -> Iterator[None]:
    """JAX's own cache keeps nothing of what takes less than forever: what is for absent devices cannot be loaded."""
    key = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, key)
    jax.config.update(key, math.inf)
    try:
        yield
    finally:
        jax.config.update(key, before)


def _refused(message: str) -> Compiled | None:
    """What a compiler says that runs out of memory: "Used 17.5G of 15.75G hbm"."""
    m = re.search(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm", message)
    if m is None:
        return None
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}
    return Compiled(float(m[1]) * unit[m[2]], False, float(m[3]) * unit[m[4]], 0.0, None)


def extrapolated(less: Compiled, more: Compiled, few: tuple[int, int], layers: int) -> Compiled:
    """A model of many layers from two with `few`: each number grows by the same with each layer."""

    def along(a: float, b: float) -> float:
        return a + (layers - few[0]) / (few[1] - few[0]) * (b - a)

    if less.reading is None or more.reading is None:
        return more
    a, b = less.reading, more.reading
    sums: list[dict[tuple, float]] = [{}, {}]  # of collectives that are alike
    for r, into in zip((a, b), sums, strict=True):
        for c in r.collectives:
            key = c.kind, c.axes, c.size
            into[key] = into.get(key, 0.0) + c.payload * c.times
    grown = [
        Collective(key[0], key[1], key[2], along(sums[0].get(key, 0.0), sums[1].get(key, 0.0)), 1.0, "")
        for key in {**sums[0], **sums[1]}
    ]
    r = Reading(
        {k: along(a.flops.get(k, 0), b.flops.get(k, 0)) for k in {**a.flops, **b.flops}},
        along(a.moved, b.moved),
        grown,
        {k: along(a.kernels.get(k, 0), b.kernels.get(k, 0)) for k in {**a.kernels, **b.kernels}},
        along(a.kernel_flops, b.kernel_flops),
        along(a.scores, b.scores),
        along(a.saved, b.saved),
        along(a.offloaded, b.offloaded),
        b.unknown_loops,
    )
    peak, temporaries = along(less.peak, more.peak), along(less.temporaries, more.temporaries)
    return Compiled(peak, less.fits and more.fits, None, temporaries, r, less.cached and more.cached)


# --- on disk --------------------------------------------------------------------------------------------------------


def _file(text: str, job: Job, t: Topology) -> Path:
    """Where it is kept: by the program before compilation, the machine, and the versions of those that compile."""
    versions = {p: _version(p) for p in ("jax", "jaxlib", "libtpu")}
    of = [_VERSION, t.name, t.slices, dict(job.mesh.shape), versions, os.environ.get("XLA_FLAGS", "")]
    of += [os.environ.get("LIBTPU_INIT_ARGS", ""), re.sub(r"loc\(.*?\)", "", text)]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "jaxtune" / "plan" / f"{hashlib.blake2b(json.dumps(of).encode(), digest_size=16).hexdigest()}.json"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _save(file: Path, c: Compiled) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        log.write_whole(file, json.dumps(dataclasses.asdict(c)))
    except OSError as e:
        log.warn(f"{file}: {e.strerror}; the plan is not kept, and the next one compiles again")


def _load(file: Path) -> Compiled | None:
    try:
        tree = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    r = tree["reading"]
    if r is not None:
        r["collectives"] = [Collective(**{**c, "axes": tuple(c["axes"])}) for c in r["collectives"]]
        tree["reading"] = Reading(**r)
    return Compiled(**{**tree, "cached": True})
