"""Names of machines and what they stand for: `v5e:4x4`, `v5e-16`, `v6e-1`, `v5p-128`, `cpu`, `cpu:8`, `gpu`.

TPUs need not be there: libtpu describes their devices and compiles for them. As in Google's names, the number of
v2 to v5p and tpu7x counts cores, two to a chip, that of v5e and v6e chips.
"""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtune import chips
from jaxtune.chips import Chip
from jaxtune.errors import UserError

_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_DEEP = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
    1024: "8x8x16", 2048: "8x16x16",
}  # fmt: skip
_CORES = ("v4", "v5p", "tpu7x")  # generations whose names count cores
_NAMES = {"v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "v5": "v5p", "7x": "tpu7x", "v7x": "tpu7x"}
_ENVIRONMENT = {  # libtpu asks the cloud who it is, and holds a lock on devices; here is neither
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Topology(NamedTuple):
    """A machine."""

    name: str  # v5e:4x4, cpu:8, gpu
    platform: str  # tpu, cpu, gpu
    chip: Chip | None  # None where nothing is known of it
    shape: tuple[int, ...]  # chips along each physical axis
    cores: int = 1  # JAX devices of a chip
    slices: int = 1

    @property
    def devices(self) -> int:
        return math.prod(self.shape) * self.cores * self.slices


def parse(name: str, slices: int = 1) -> Topology:
    """What a name stands for; no device is looked at.

    >>> parse("v5e-8").name, parse("v5p-128").name, parse("v6e-1").devices, parse("cpu:8").devices
    ('v5e:2x4', 'v5p:4x4x4', 1, 8)

    Raises:
      UserError: the name is of no machine that is known.
    """
    if m := re.fullmatch(r"(cpu|gpu)(?::(\d+))?", name):
        return Topology(name, m[1], None, (int(m[2] or 0),))
    m = re.fullmatch(r"([a-z]*\d\w*?)(?:-(\d+)|:(\d+(?:x\d+)+))", name.lower())
    kind = _NAMES.get(m[1], m[1]) if m else ""
    chip = next((c for c in chips.CHIPS if c.name == kind and c.whole_axis), None)
    if m is None or chip is None:
        raise UserError(f"topology {name!r} is not known; write one such as v5e-8, v6e:2x4, v5p:2x2x1, cpu:8 or gpu")
    table = _FLAT if kind in ("v5e", "v6e") else _DEEP
    if m[2]:
        count = int(m[2]) // (2 if kind in _CORES else 1)
        if count not in table:
            known = ", ".join(f"{m[1]}-{n * (2 if kind in _CORES else 1)}" for n in table)
            raise UserError(f"topology {name}: there are {known}; or write its shape, such as {kind}:{table[16]}")
        shape = table[count]
    else:
        shape = m[3]
    sizes = tuple(int(n) for n in shape.split("x"))
    return Topology(f"{kind}:{shape}", "tpu", chip, sizes, 2 if kind == "tpu7x" else 1, slices)


def price(t: Topology, prices: Mapping[str, float]) -> float | None:
    """Of a chip and hour, by the machine's name in any of its forms or the chip's; None where there is none.

    >>> price(parse("v5e:2x2"), {"v5e-4": 1.2, "v6e": 2.7})
    1.2

    Raises:
      UserError: a price is of no machine and of no chip.
    """
    chip, machine = None, None
    for name, value in prices.items():
        if any(name.lower() == c.name.lower() for c in chips.CHIPS):
            chip = value if t.chip is not None and name.lower() == t.chip.name.lower() else chip
            continue
        try:
            machine = value if parse(name).name == t.name else machine
        except UserError as e:
            raise UserError(f"price of {name}: {e}") from e
    return chip if machine is None else machine


def has_compiler() -> bool:
    """Whether TPUs can be compiled for here."""
    return importlib.util.find_spec("libtpu") is not None


def devices(t: Topology) -> Sequence[Any]:
    """The devices of a machine: descriptions, for TPUs; else those that are here.

    Raises:
      UserError: libtpu is missing or refuses the shape; this machine has no such devices.
    """
    import jax

    if t.platform != "tpu":
        try:
            found = jax.devices("cuda" if t.platform == "gpu" else "cpu")
        except RuntimeError as e:
            raise UserError(f"topology {t.name}: this machine has no {t.platform}; name a TPU, such as v5e-8") from e
        wanted = t.shape[0] or len(found)
        if wanted > len(found):
            raise UserError(f"topology {t.name}: there are {len(found)} devices; ask for as many, or name a TPU")
        return found[:wanted]
    from jax.experimental import topologies

    more: dict[str, Any] = {"num_slices": t.slices} if t.slices > 1 else {}
    if math.prod(t.shape) == 1:
        more["chips_per_host_bounds"] = (1, 1, 1)
    if t.chip is not None and t.chip.name == "v4":
        more["chip_config_name"] = "megachip"
    with quiet():
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=t.name, **more).devices
        except (RuntimeError, NotImplementedError, ValueError) as e:
            first = (str(e).splitlines() or ["?"])[0]
            raise UserError(f"topology {t.name}: libtpu says: {first[:200]}; name another shape") from e


def here(t: Topology, found: Sequence[Any]) -> Topology:
    """The topology of devices that are here: how many, and of which chip."""
    return t._replace(shape=(len(found),), chip=chips.of(found[0].device_kind))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """libtpu's environment set, and what it writes on standard error from C dropped."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def stand_ins(t: Topology) -> Sequence[Any]:
    """As many of this machine's CPU devices, to lay a state out over them where its compiler is missing.

    Raises:
      UserError: JAX has started with fewer.
    """
    import jax

    found = jax.devices("cpu")
    if len(found) < t.devices:
        raise UserError(
            f"topology {t.name}: {t.devices} devices are not to be had without libtpu once JAX has started; pip "
            "install 'jaxtune[plan]', or run `jaxtune plan` in a process of its own"
        )
    return found[: t.devices]
