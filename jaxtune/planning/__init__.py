"""What a run will need and take, before it runs: the very step compiled for the machine that is named.

Without libtpu the state's bytes are exact all the same, and the rest goes by rule.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from jaxtune import log
from jaxtune.config import Config, load
from jaxtune.errors import UserError
from jaxtune.job import Job
from jaxtune.planning.compiled import Compiled
from jaxtune.planning.counting import flops_per_token
from jaxtune.planning.report import Report
from jaxtune.planning.topology import Topology

__all__ = ["Report", "flops_per_token", "plan"]

How = Literal["full", "fast", "rule"]


def plan(
    c: Config | str | Path,
    topologies: Sequence[str],
    how: How = "full",
    prices: Mapping[str, float] | None = None,
    cache: bool = True,
) -> list[Report]:
    """A report for each machine.

    Args:
      c: the run, or its YAML file; its model may be a preset's name, and its data need not be there.
      topologies: names such as v5e-8, v6e:2x4, cpu:8, gpu.
      how: "full" compiles the step; "fast" compiles the model with a few layers and with some more of the same kinds,
        and goes on from there (bytes moved may then be off by a fifth: small arrays stay on the chip), where all layers
        train alike; "rule" compiles nothing.
      prices: dollars for a chip and hour, by topology or by chip.
      cache: take what was said of the very same step before.

    >>> plan("configs/llama3-8b-lora.yaml", ["v5e-8", "v6e-8"])[0].fits  # doctest: +SKIP
    True

    Raises:
      UserError: the config does not fit, or a machine is not known.
    """
    from jaxtune.planning import topology

    c = c if isinstance(c, Config) else load(Path(c))
    return [report(c, topology.parse(name, c.mesh.slices or 1), how, prices or {}, cache) for name in topologies]


def imagined(c: Config, t: Topology, layers: int | None = None) -> Job:
    """The job of a config on a machine, with so many layers if given.

    Raises:
      UserError: the config does not fit, or the machine cannot be had.
    """
    from jaxtune.planning import subject, topology

    if t.platform != "tpu" or topology.has_compiler():
        return subject.imagined(c, topology.devices(t), layers)
    return subject.imagined(c, topology.stand_ins(t), layers, t)


def report(
    c: Config,
    t: Topology,
    how: How = "full",
    prices: Mapping[str, float] | None = None,
    cache: bool = True,
    job: Job | None = None,
) -> Report:
    """The report for one machine; see `plan`. A `job` that differs in `train` alone may be given, and saves time."""
    from jaxtune.planning import compiled, counting, estimate, topology

    if t.platform == "tpu" and not topology.has_compiler():
        log.warn("libtpu is missing: state is exact, the rest by rule; pip install 'jaxtune[plan]' compiles the step")
        how = "rule"
    price = topology.price(t, prices or {})
    job = imagined(c, t) if job is None else dataclasses.replace(job, config=c)
    if t.platform != "tpu":
        t = topology.here(t, list(job.mesh.devices.flat))
    done, said = _step(c, t, how, job, cache)
    length = c.data.max_length
    count = counting.count(job, length)
    times = None
    if (r := done.reading) is not None:
        kernels = r.kernel_flops + r.scores * counting.seen_share(job.blueprint.decoder, length)
        done = dataclasses.replace(done, reading=dataclasses.replace(r, kernel_flops=kernels, scores=0.0))
        times = estimate.seconds(t, r, kernels, c.mesh.over_slices)
    tokens = c.train.batch_size * length
    return Report(c, t, compiled.state(job), done, said, count, tokens, dict(job.mesh.shape), times, price)


def _step(c: Config, t: Topology, how: How, job: Job, cache: bool) -> tuple[Compiled, str]:
    """What a step takes, and how that is known."""
    from jaxtune.planning import compiled, rule, subject

    if how == "rule":
        return rule.by_rule(job), "by rule, not compiled"
    layers, why = job.blueprint.decoder.layers, ""
    if how == "fast":
        few = subject.few_layers(job)
        why = ", because those that train and those that do not are several groups"
        if few is not None and few[1] < layers:
            try:
                less, more = (compiled.step(imagined(c, t, n), t, cache) for n in few)
            except UserError as e:
                why = f", because a model of {few[0]} is refused: {e}"
            else:
                said = f"compiled with {few[0]} and {few[1]} of {layers} layers, and on from there"
                return compiled.extrapolated(less, more, few, layers), said
        elif few is not None:
            why = ", which are few"
    return compiled.step(job, t, cache), f"compiled, all {layers} layers{why}"
