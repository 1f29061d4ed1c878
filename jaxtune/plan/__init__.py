"""What a run will need and take, before it runs: the very step compiled for the machine that is named.

Without libtpu the state's bytes are exact all the same, and the rest goes by rule.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxtune import log
from jaxtune.config import Config
from jaxtune.plan.counting import flops_per_token
from jaxtune.plan.report import Report

__all__ = ["Report", "flops_per_token", "plan"]

How = Literal["full", "fast", "rule"]


def plan(
    c: Config,
    topologies: Sequence[str],
    how: How = "full",
    prices: Mapping[str, float] | None = None,
    cache: bool = True,
) -> list[Report]:
    """A report for each machine.

    Args:
      c: the run; its model may be a preset's name, and its data need not be there.
      topologies: names such as v5e-8, v6e:2x4, cpu:8, gpu.
      how: "full" compiles the step; "fast" compiles the model with two and with three layers and goes on from there;
        "rule" compiles nothing.
      prices: dollars for a chip and hour, by topology or by chip.
      cache: take what was said of the very same step before.

    Raises:
      UserError: the config does not fit, or a machine is not known.
    """
    from jaxtune.plan import topology

    return [report(c, topology.parse(name, c.mesh.slices or 1), how, prices or {}, cache) for name in topologies]


def report(
    c: Config, t: Any, how: How = "full", prices: Mapping[str, float] | None = None, cache: bool = True
) -> Report:
    """The report for one `topology.Topology`; see `plan`."""
    from jaxtune.plan import compiled, counting, estimate, rule, subject, topology

    if t.platform == "tpu" and not topology.has_compiler():
        log.warn("libtpu is missing: state is exact, the rest by rule; pip install 'jaxtune[plan]' compiles the step")
        how, devices = "rule", topology.stand_ins(t)
    else:
        devices = topology.devices(t)
    if t.platform != "tpu":
        t = topology.here(t, devices)
    job = subject.imagined(c, devices)
    layers = job.blueprint.decoder.layers
    if how == "rule":
        done, said = rule.by_rule(job), "by rule, not compiled"
    elif how == "fast" and layers > 3:
        two, three = (compiled.step(subject.imagined(c, devices, n), t, cache) for n in (2, 3))
        done, said = (
            compiled.extrapolated(two, three, layers),
            f"compiled with 2 and 3 of {layers} layers, and on from there",
        )
    else:
        done, said = compiled.step(job, t, cache), f"compiled, all {layers} layers"
    length = c.data.max_length
    count = counting.count(job, length)
    rows = c.train.batch_size // c.train.accumulation
    tokens = c.train.accumulation * rows * length
    times = None
    if done.reading is not None:
        kernel = done.reading.kernel_flops
        if done.reading.kernels and not kernel:  # attention's, by rule: forward, again, and backward with its scores
            again = 1 + (c.train.remat != "none")
            kernel = count.attention / 3 * (again + 2.5) * tokens / t.devices
        times = estimate.seconds(t, done.reading, kernel)
    price = (prices or {}).get(t.name) or (prices or {}).get(t.chip.name if t.chip else "")
    return Report(c, t, compiled.state(job), done, said, count, tokens, dict(job.mesh.shape), times, price)
