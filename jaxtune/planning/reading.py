"""What a compiled step does on each device, read from its HLO: matrix products, bytes moved, what goes over the net."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from jaxtune.planning import hlo
from jaxtune.planning.hlo import Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_STACKED = re.compile(r"jvp\(\w+\)/while/body/([^/]*/)?dynamic_update_slice$")  # what a scan gives for each round
_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}  # products of queries' and keys' size each
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One place of the program that sends."""

    kind: str
    axes: tuple[str, ...]  # of the mesh
    size: int  # devices of a group
    payload: float  # bytes of the whole array, once
    times: float  # in a step
    source: str  # op_name

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step, by rings."""
        ring = (self.size - 1) / self.size
        factor = {"all-reduce": 2 * ring, "collective-permute": 1.0}.get(self.kind, ring)
        return self.payload * factor * self.times


@dataclasses.dataclass(frozen=True)
class Reading:
    """Of one device and one step."""

    flops: Mapping[str, float]  # of matrix products by dtype of what they multiply: bf16, f32, s8 …
    moved: float  # bytes that instructions read from and write to HBM
    collectives: list[Collective]
    kernels: Mapping[str, float]  # hand-written kernels by name: how often they run
    kernel_flops: float  # as they say
    scores: float  # operations of attention's kernels, which say nothing, if every query saw every key
    saved: float  # bytes that the layers' forward pass keeps for the backward pass
    offloaded: float  # of them in the host's memory
    unknown_loops: list[str]  # which are counted once

    def by_kind(self) -> dict[tuple[str, str], float]:
        """Bytes sent, by kind and axes."""
        out: dict[tuple[str, str], float] = defaultdict(float)
        for c in self.collectives:
            out[c.kind, "+".join(c.axes)] += c.sent
        return dict(sorted(out.items(), key=lambda x: -x[1]))


def read(text: str, mesh: Mapping[str, int]) -> Reading:
    """Read the text of a compiled step; `mesh` has the sizes of the axes that it was compiled for."""
    module = hlo.read(text)
    devices = int(np.prod(list(mesh.values())))
    flops: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = defaultdict(float)
    sent: dict[tuple, Collective] = {}
    saved: dict[tuple[str, str], hlo.Shape] = {}
    unknown: list[str] = []
    moved = kernel_flops = scores = offloaded = 0.0
    for computation, i, times in hlo.walk(module):
        if times < 0:
            unknown.append(i.op_name or i.name)
            continue
        moved += times * _traffic(module, computation, i)
        for place, inner in _with_fused(module, computation, i):
            if inner.opcode in ("dot", "convolution"):
                dtype, n = _product(module, place, inner)
                flops[dtype] += times * n
            elif inner.opcode == "custom-call":
                if found := re.search(r'custom_call_target="(tpu_custom_call|mosaic\w*|__gpu\$\w+)"', inner.rest):
                    kernels[name := _kernel_name(inner) or found[1]] += times
                    if (products := next((n for k, n in _SPLASH.items() if name.startswith(k)), 0)) > 0:
                        scores += times * products * _scores(module, place, inner)
                    elif cost := re.search(r'"cost_estimate":\s*\{[^}]*"flops":\s*"?(\d+)', inner.rest):
                        kernel_flops += times * int(cost[1])
                elif "__cublas$" in inner.rest:
                    flops[inner.shapes[0].dtype] += times * _cublas(module, place, inner)
            elif (kind := _kind(place, inner)) is not None:
                c = _collective(module, place, inner, kind, times, mesh, devices)
                # the halves and the middle of an asynchronous one carry the same channel
                channel = inner.attribute("channel_id", r"(\d+)") or inner.name
                sent[computation, channel] = max(c, sent.get((computation, channel), c), key=lambda c: c.payload)
        if (shape := _kept(module, i)) is not None:
            saved[computation, i.name] = shape
    for shape in saved.values():
        offloaded += shape.bytes if hlo.HOST in shape.layout else 0
    kept = sum(s.bytes for s in saved.values())
    joined = [c for c in sent.values() if c.size > 1]
    return Reading(dict(flops), moved, joined, dict(kernels), kernel_flops, scores, kept, offloaded, unknown)


def _with_fused(module: Module, computation: str, i: Instruction) -> Iterator[tuple[str, Instruction]]:
    """An instruction, or those that are fused in it."""
    if i.opcode in ("fusion", "async-start"):
        for called in i.called:
            for inner in module.computations.get(called, {}).values():
                yield from _with_fused(module, called, inner)
    else:
        yield computation, i


# --- matrix products ------------------------------------------------------------------------------------------------


def _product(module: Module, place: str, i: Instruction) -> tuple[str, float]:
    left, right = (module.shape(place, o)[0] for o in i.operands[:2])
    out = i.shapes[0]
    if i.opcode == "dot":
        axes = i.attribute("lhs_contracting_dims", r"\{([\d,]*)\}") or ""
        return left.dtype, 2.0 * out.size * np.prod([left.dims[int(n)] for n in axes.split(",") if n])
    labels = i.attribute("dim_labels", r"(\w+_\w+->\w+)") or ""
    (from_, kernel), to = labels.split("->")[0].split("_"), labels.split("->")[1]
    inputs, outputs = right.dims[kernel.index("i")], out.dims[to.index("f")]
    total = 2.0 * out.dims[to.index("b")] * inputs * outputs
    total /= int(i.attribute("batch_group_count", r"(\d+)") or 1)
    for n, window in enumerate(_windows(i, len(kernel) - 2)):
        axis = str(n)
        sizes = left.dims[from_.index(axis)], right.dims[kernel.index(axis)], out.dims[to.index(axis)]
        total *= _hits(*sizes, **window)
    return left.dtype, total


def _windows(i: Instruction, spatial: int) -> list[dict[str, int]]:
    """Stride, padding in front and dilations of each spatial axis; TPUs multiply batches of matrices in such axes."""
    text = i.attribute("window", r"\{([^}]*)\}") or ""
    given = dict(re.findall(r"(\w+)=([\dx_\-]+)", text))

    def of(name: str, n: int, default: str) -> str:
        return given[name].split("x")[n] if name in given else default

    return [
        {
            "stride": int(of("stride", n, "1")),
            "before": int(of("pad", n, "0_0").rpartition("_")[0]),
            "dilate": int(of("lhs_dilate", n, "1")),
            "kernel_dilate": int(of("rhs_dilate", n, "1")),
        }
        for n in range(spatial)
    ]


def _hits(into: int, kernel: int, out: int, stride: int, before: int, dilate: int, kernel_dilate: int) -> int:
    """How many pairs of output and kernel positions meet an input that is there, not padding nor a gap."""
    at = np.arange(out)[:, None] * stride - before + np.arange(kernel) * kernel_dilate
    return int(((at % dilate == 0) & (at >= 0) & (at // dilate < into)).sum())


def _cublas(module: Module, place: str, i: Instruction) -> float:
    left = module.shape(place, i.operands[0])[0]
    axes = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.rest)
    found = re.findall(r"\d+", axes[1]) if axes else []
    return 2.0 * i.shapes[0].size * float(np.prod([left.dims[int(n)] for n in found]))


def _scores(module: Module, place: str, i: Instruction) -> float:
    """Operations of one product in an attention kernel, of queries `[B, N, T, H]` and keys `[B, K, S, H]`; where a
    device has one row, B is not there."""
    shapes = [s for o in i.operands for s in module.shape(place, o)]
    q, k = [s for s in shapes if len(s.dims) >= 3 and s.dtype in ("bf16", "f16", "f32")][:2]
    return 2.0 * q.size * k.dims[-2]


def _kernel_name(i: Instruction) -> str | None:
    found = re.search(r'kernel_name[\\"=: ]+([\w.]+)', i.rest) or re.search(
        r"/([\w.]*(?:mha|attention|flash)[\w.]*)", i.op_name
    )
    return found[1] if found else None


# --- the net --------------------------------------------------------------------------------------------------------


def _kind(place: str, i: Instruction) -> str | None:
    kind = i.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    return "reduce-scatter" if kind == "all-reduce" and "reduce-scatter" in place else kind


def _collective(
    module: Module, place: str, i: Instruction, kind: str, times: float, mesh: Mapping[str, int], devices: int
) -> Collective:
    members = hlo.groups(i, devices)
    operands = sum(s.bytes for o in i.operands for s in module.shape(place, o))
    size = len(members[0])
    if kind == "collective-permute":
        return Collective(kind, hlo.axes_of(members, mesh), devices, operands, times, i.op_name)
    payload = operands * size if kind == "all-gather" else operands
    return Collective(kind, hlo.axes_of(members, mesh), size, payload, times, i.op_name)


# --- memory ---------------------------------------------------------------------------------------------------------


def _traffic(module: Module, computation: str, i: Instruction) -> float:
    """Bytes to and from HBM of one instruction that runs on its own."""
    if i.opcode in _FREE or i.opcode.endswith("-done") or _kind(computation, i) is not None:
        return 0.0
    if i.opcode in ("copy-start", "slice-start"):  # (result, operand, context) and ((operand), result, context)
        part = i.shapes[i.opcode == "slice-start"].bytes
        return part * sum(s.in_hbm for s in i.shapes[:2])
    read = 0.0
    for n, operand in enumerate(i.operands):
        whole = sum(s.bytes for s in module.shape(computation, operand) if s.in_hbm)
        read += _needed(module, i, n, operand, whole) if whole else 0.0
    written = sum(s.bytes for s in i.shapes if s.in_hbm)
    place = i.called[0] if i.opcode == "fusion" and i.called else computation
    last = (module.root(place) if place != computation else None) or i
    if last.opcode == "dynamic-update-slice":
        written = min(written, sum(s.bytes for s in module.shape(place, last.operands[1])))
    return read + written


def _needed(module: Module, user: Instruction, n: int, name: str, whole: float) -> float:
    """Bytes that an instruction reads of its operand number `n`: all, or what it slices; none of what it writes to."""
    if user.opcode == "dynamic-update-slice" and user.operands[0] == name:
        return 0.0
    if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
        return min(whole, sum(s.bytes for s in user.shapes))
    if user.opcode != "fusion" or not user.called:
        return whole
    inner = module.computations.get(user.called[0], {})
    names = {next((p.name for p in inner.values() if p.opcode == "parameter" and p.arguments == str(n)), "")}
    total = 0.0
    for i in inner.values():
        for k, operand in enumerate(i.operands):
            if operand in names and i.opcode == "bitcast":
                names.add(i.name)
                total += whole if i.root else 0.0
            elif operand in names:
                total += _needed(module, i, k, operand, whole)
    return min(total, whole)


def _kept(module: Module, i: Instruction) -> hlo.Shape | None:
    """What a layer of the forward pass writes into an array of all layers, which the backward pass reads."""
    if not _STACKED.search(i.op_name) or "transpose(" in i.op_name:
        return None
    last = module.root(i.called[0]) if i.opcode == "fusion" and i.called else i
    if last is None or last.opcode != "dynamic-update-slice" or not i.shapes:
        return None
    return i.shapes[0]
