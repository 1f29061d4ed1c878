"""Accelerators by their `device_kind`: memory, arithmetic, bandwidths. What is not known here is no error.

Sources: Cloud TPU's documentation, "How to Scale Your Model" (Austin et al., 2025) for links, vendors' data sheets for
GPUs. Arithmetic is dense, in operations per second; bandwidths are bytes per second.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple


class Chip(NamedTuple):
    """One chip; where a chip shows itself as two JAX devices, one of them."""

    name: str
    kind: str  # a regex on device_kind
    memory: int  # bytes of HBM
    bandwidth: float  # of HBM, bytes/s
    flops: Mapping[str, float]  # operations/s by dtype: bfloat16, int8, fp8, float32
    link: float = 0.0  # one ICI link in one direction, or NVLink's share in one direction, bytes/s
    links: int = 0  # ICI links
    host: float = 0.0  # to the host's memory, bytes/s
    network: float = 25e9  # of a host to others, bytes/s
    whole_axis: int = 0  # a TPU axis of so many chips closes into a ring; 0 where that is not so

    def rate(self, dtype: str) -> float:
        """Operations per second in a dtype; bfloat16's where the chip has no faster way."""
        return self.flops.get(dtype, self.flops["bfloat16"])


GIB = 2**30
_HOPPER = {"bfloat16": 989e12, "int8": 1979e12, "fp8": 1979e12, "float32": 67e12}
_AMPERE = {"bfloat16": 312e12, "int8": 624e12, "float32": 19.5e12}
_ADA = {"bfloat16": 121e12, "int8": 242e12, "fp8": 242e12, "float32": 30e12}
CHIPS = (
    Chip("v4", r"TPU v4$", 32 * GIB, 1200e9, {"bfloat16": 275e12}, 45e9, 6, 15e9, whole_axis=4),
    Chip("v5e", r"TPU v5 ?(lite|e)$", 16 * GIB, 819e9, {"bfloat16": 197e12, "int8": 393e12}, 45e9, 4, 15e9,
         whole_axis=16),
    Chip("v5p", r"TPU v5p?$", 95 * GIB, 2765e9, {"bfloat16": 459e12, "int8": 918e12}, 90e9, 6, 15e9, whole_axis=4),
    Chip("v6e", r"TPU v6 ?(lite|e)$", 32 * GIB, 1638e9, {"bfloat16": 918e12, "int8": 1836e12, "fp8": 918e12}, 90e9, 4,
         32e9, whole_axis=16),
    Chip("tpu7x", r"TPU ?(v?7x|v7)$", 96 * GIB, 3690e9, {"bfloat16": 1153e12, "fp8": 2307e12}, 90e9, 6, 32e9,
         whole_axis=4),
    Chip("H200", r"NVIDIA H200", 141 * 10**9, 4.8e12, _HOPPER, 450e9, 1, 55e9),
    Chip("H100", r"NVIDIA H100", 80 * 10**9, 3.35e12, _HOPPER, 450e9, 1, 55e9),
    Chip("A100-80G", r"NVIDIA A100.*80GB", 80 * 10**9, 2.0e12, _AMPERE, 300e9, 1, 25e9),
    Chip("A100", r"NVIDIA A100", 40 * 10**9, 1.55e12, _AMPERE, 300e9, 1, 25e9),
    Chip("L4", r"NVIDIA L4$", 24 * 10**9, 300e9, _ADA, 25e9, 1, 25e9),
)  # fmt: skip


def of(kind: str) -> Chip | None:
    """The chip of a `device_kind`; None where it is not known.

    >>> of("TPU v5 lite").name, of("TPU v5").name, of("cpu")
    ('v5e', 'v5p', None)
    """
    return next((c for c in CHIPS if re.match(c.kind, kind)), None)
