"""From operations and bytes to seconds: a roofline (Williams et al., 2009), an estimate and no measurement.

The rule: each of arithmetic, memory and network takes what it has to do over a share of the chip's rate, that real
programs reach. A step takes as long as the slowest of them, where they overlap wholly; their sum, where they do not.
"""

import math
import os
from collections.abc import Mapping
from typing import NamedTuple

from jaxtune import chips
from jaxtune.chips import Chip
from jaxtune.planning.reading import Collective, Reading
from jaxtune.planning.topology import Topology

REACHED = {"arithmetic": 0.75, "memory": 0.8, "network": 0.8}  # shares of the rates in `chips`
_ARITHMETIC = {"v6e": 0.6}  # of its 918 TFLOP/s published runs reach less than of older chips' rates
_USABLE = {"v5e": 15.75, "v6e": 31.25, "v5p": 95.74}  # GiB that the compiler gives a program, as it says itself
_DTYPES = {"s8": "int8", "u8": "int8", "s4": "int8"}


class Seconds(NamedTuple):
    """Of one step."""

    arithmetic: float
    memory: float
    network: float

    @property
    def overlapped(self) -> float:
        return max(self)

    @property
    def one_by_one(self) -> float:
        return sum(self)

    @property
    def bound(self) -> str:
        return self._fields[self.index(max(self))]


def usable(chip: Chip | None) -> float | None:
    """Bytes of memory that a program may take, of a GPU what JAX reserves; None where the chip is not known."""
    if chip is None:
        return None
    if not chip.whole_axis:
        return chip.memory * float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))
    return _USABLE.get(chip.name, chip.memory / chips.GIB) * chips.GIB


def reached(chip: Chip) -> float:
    """The share of its arithmetic that programs reach."""
    return _ARITHMETIC.get(chip.name, REACHED["arithmetic"])


def seconds(t: Topology, r: Reading, kernel_flops: float, over_slices: str = "data") -> Seconds | None:
    """Of a step as it was compiled; None where the chip is not known. `kernel_flops` are of hand-written kernels."""
    if t.chip is None:
        return None
    work = sum(n / _rate(t.chip, dtype) for dtype, n in r.flops.items()) + kernel_flops / t.chip.rate("bfloat16")
    wire = sum(c.sent / bandwidth(t, c, over_slices) for c in r.collectives)
    return Seconds(work / reached(t.chip), r.moved / t.chip.bandwidth / REACHED["memory"], wire / REACHED["network"])


def _rate(chip: Chip, dtype: str) -> float:
    if dtype == "f32":  # on TPUs six products of bfloat16 parts
        return chip.flops.get("float32", chip.rate("bfloat16") / 6)
    return chip.rate("fp8" if dtype.startswith("f8") else _DTYPES.get(dtype, "bfloat16"))


def bandwidth(t: Topology, c: Collective, over_slices: str = "data") -> float:
    """Bytes per second that a chip sends in a collective.

    A collective over some of the devices has a share of the physical axes, at least one, and both directions of those
    that close into a ring. One that permutes sends each chip's part to one other, over one link. What goes along the
    axis `over_slices` leaves the slice.
    """
    assert t.chip is not None
    if t.slices > 1 and over_slices in c.axes:
        return t.chip.network / 4  # hosts have four chips, or more
    if t.platform != "tpu":
        return max(t.chip.link, 1.0)
    if c.kind == "collective-permute":
        return t.chip.link
    axes = [n for n in t.shape if n > 1] or [1]
    share = math.log(max(c.size, 2)) / math.log(max(t.devices, 2))
    took = sorted(axes, reverse=True)[: max(1, round(len(axes) * share))]
    return t.chip.link * sum(2 if n % t.chip.whole_axis == 0 else 1 for n in took)


def utilisation(chip: Chip | None, flops: float, duration: float) -> float | None:
    """The share of the chip's bfloat16 arithmetic that useful operations take; None where the chip is not known."""
    return None if chip is None or not duration else flops / duration / chip.rate("bfloat16")


def cost(price: float, tokens_per_second: float) -> float:
    """Dollars for a million tokens, at so many dollars for a chip and an hour.

    >>> round(cost(1.2, 2000), 3)
    0.167
    """
    return price / 3600 / tokens_per_second * 1e6


def rule(chip: Chip | None) -> str:
    """The estimate's rule, in a line."""
    if chip is None:
        return "the chip is not known: no times"
    parts: Mapping[str, float] = REACHED | {"arithmetic": reached(chip)}
    shares = ", ".join(f"{100 * x:.0f} % of its {name}" for name, x in parts.items())
    return f"an estimate: the slowest of {shares}, all overlapped"
