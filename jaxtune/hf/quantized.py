"""Quantised Hugging Face folders, both ways: GPTQ's tensors, and the 8-bit ones of compressed-tensors.

GPTQ (its first format, as AutoGPTQ and GPTQModel write it) holds a matrix `[O, I]` as `qweight` `[I·bits/32, O]` and
`qzeros` `[G, O·bits/32]`, codes packed into int32 from the lowest bits on, the zeros less one; `scales` `[G, O]` in
float16; and `g_idx` `[I]`, the group of each input. compressed-tensors (vLLM's) holds `weight` in int8 or fp8 and
`weight_scale` `[O, 1]`.

Folders are read as dense matrices, so whatever reads a model folder reads these.

Dimensions: O outputs and I inputs of a matrix, G groups of inputs.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxtune.errors import UserError
from jaxtune.hf.files import Entry
from jaxtune.nodes.grid import Grid, Scheme, dense, nearest

KEY = "quantization_config"
_MATRIX = re.compile(r"\.layers\.\d+\..*_proj\.weight$")
_WORD = 32  # bits of what codes are packed into


class Stored(Protocol):
    """A tensor that can be had when it is asked for, see `load.Stored`."""

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def open(self) -> np.ndarray: ...


def pack(codes_NM: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the first axis, several to an int32, the first in the lowest bits.

    >>> [hex(x) for x in pack(np.arange(1, 9, dtype=np.uint8)[:, None], 4)[:, 0]]
    ['-0x789abcdf']
    """
    each = _WORD // bits
    wide = codes_NM.astype(np.uint32).reshape(-1, each, *codes_NM.shape[1:])
    shifts = (np.arange(each, dtype=np.uint32) * bits).reshape(1, each, *(1,) * (codes_NM.ndim - 1))
    return np.bitwise_or.reduce(wide << shifts, axis=1).view(np.int32)


def unpack(words_NM: np.ndarray, bits: int) -> np.ndarray:
    """The codes of `pack`, uint8."""
    each = _WORD // bits
    shifts = (np.arange(each, dtype=np.uint32) * bits).reshape(1, each, *(1,) * (words_NM.ndim - 1))
    wide = (np.ascontiguousarray(words_NM).view(np.uint32)[:, None] >> shifts) & np.uint32(2**bits - 1)
    return wide.astype(np.uint8).reshape(-1, *words_NM.shape[1:])


# --- written ----------------------------------------------------------------------------------------------------------


def gptq_entries(module: str, grid: Grid, bits: int) -> dict[str, Entry]:
    """The tensors of a matrix in GPTQ's format; `module` is its Hugging Face name without ".weight".

    Raises:
      UserError: its codes do not fill whole words.
    """
    (n_out, n_in), each = grid.shape, _WORD // bits
    if n_in % each or n_out % _WORD:
        raise UserError(
            f"--format gptq: {module} is {n_out} × {n_in}; it packs outputs by {_WORD} and inputs by {each}; take "
            "--format gguf, or --dtype fp8 or --method smoothquant with --format hf"
        )
    G = grid.scale_OG.shape[1]
    i32, f16 = np.dtype(np.int32), np.dtype(np.float16)
    return {
        f"{module}.qweight": Entry((n_in // each, n_out), i32, lambda: pack(np.asarray(grid.codes_OI).T, bits)),
        f"{module}.qzeros": Entry(
            (G, n_out // each), i32, lambda: pack(np.asarray(grid.zero_OG) - np.uint8(1), bits).T.copy()
        ),
        f"{module}.scales": Entry((G, n_out), f16, lambda: np.asarray(grid.scale_OG).T.astype(f16)),
        f"{module}.g_idx": Entry((n_in,), i32, lambda: np.asarray(grid.group_I, np.int32)),
    }


def gptq_config(s: Scheme, method: str, act_order: bool, damp: float, version: str) -> dict[str, Any]:
    """`quantization_config` of a folder with such tensors."""
    return {
        "quant_method": "gptq",
        "bits": s.bits,
        "group_size": s.group or -1,
        "desc_act": act_order,
        "sym": s.symmetric,
        "damp_percent": damp,
        "static_groups": False,
        "true_sequential": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "meta": {"quantizer": [f"jaxtune:{version}"], "method": method},
    }


def channel_entries(module: str, grid: Grid, dtype: str) -> dict[str, Entry]:
    """The tensors of a matrix in 8 bits with one scale for each output, as compressed-tensors has them."""
    n_out, n_in = grid.shape

    def codes() -> np.ndarray:
        if dtype == "fp8":
            return np.asarray(grid.codes_OI)
        return (np.asarray(grid.codes_OI).astype(np.int16) - 128).astype(np.int8)

    kind = np.dtype(ml_dtypes.float8_e4m3fn) if dtype == "fp8" else np.dtype(np.int8)
    f32 = np.dtype(np.float32)
    return {
        f"{module}.weight": Entry((n_out, n_in), kind, codes),
        f"{module}.weight_scale": Entry((n_out, 1), f32, lambda: np.asarray(grid.scale_OG, np.float32)),
    }


def channel_config(dtype: str, activations: bool, ignore: list[str]) -> dict[str, Any]:
    """`quantization_config` of a folder with such tensors; `activations` are rounded too, by token."""
    kind = {"num_bits": 8, "type": "float" if dtype == "fp8" else "int", "symmetric": True}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": {**kind, "strategy": "channel", "dynamic": False}}
    if activations:
        group["input_activations"] = {**kind, "strategy": "token", "dynamic": True}
    name = "float-quantized" if dtype == "fp8" else "int-quantized"
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "format": name}},
        "ignore": ignore,
    }


def on_grid(tensors: Mapping[str, Entry], s: Scheme) -> dict[str, Entry]:
    """Tensors with the layers' matrices rounded, in the dtypes that they have; rounding them again changes nothing."""

    def rounded(entry: Entry) -> Entry:
        return entry._replace(data=lambda: np.asarray(dense(nearest(entry.data(), s))).astype(entry.dtype))

    return {n: rounded(e) if _MATRIX.search(n) else e for n, e in tensors.items()}


# --- read -------------------------------------------------------------------------------------------------------------


class _Gptq:
    """A matrix of GPTQ's tensors, made dense when it is asked for, float32."""

    def __init__(self, parts: Mapping[str, Stored], bits: int) -> None:
        self.parts, self.bits, self.dtype = parts, bits, np.dtype(np.float32)
        words, n_out = parts["qweight"].shape
        self.shape = (n_out, words * _WORD // bits)

    def open(self) -> np.ndarray:
        p, bits = self.parts, self.bits
        codes_IO = unpack(p["qweight"].open(), bits)
        zero_GO = unpack(np.ascontiguousarray(p["qzeros"].open().T), bits).T.astype(np.float32) + 1
        scale_GO = p["scales"].open().astype(np.float32)
        group_I = p["g_idx"].open()
        return ((codes_IO - zero_GO[group_I]) * scale_GO[group_I]).T


@dataclasses.dataclass
class _Scaled:
    """An 8-bit matrix with a scale for each output, made dense when it is asked for, float32."""

    weight: Stored
    scale: Stored
    dtype: np.dtype = dataclasses.field(default=np.dtype(np.float32), init=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def open(self) -> np.ndarray:
        return self.weight.open().astype(np.float32) * self.scale.open().astype(np.float32).reshape(-1, 1)


def check(given: Mapping[str, Any] | None, place: str) -> None:
    """Look whether a folder's `quantization_config` is one that is read.

    Raises:
      UserError: it is not.
    """
    if not given:
        return
    remedy = "take the model before it was quantised"
    if given.get("quant_method") == "gptq":
        form, bits = given.get("checkpoint_format", given.get("format", "gptq")), given.get("bits")
        if form != "gptq" or bits not in (4, 8) or given.get("lm_head"):
            raise UserError(
                f"{place}: of GPTQ, 4 and 8 bits of the layers in the format 'gptq' are read, not {bits} bits in "
                f"{form!r}{' with the head' if given.get('lm_head') else ''}; {remedy}"
            )
    elif (form := given.get("format")) not in ("int-quantized", "float-quantized"):
        raise UserError(
            f"{place}: of compressed-tensors, int-quantized and float-quantized are read, not {form!r}; {remedy}"
        )


def rounds_activations(given: Mapping[str, Any] | None) -> str | None:
    """What a folder's products round their inputs to: "int8", "fp8", or None."""
    for group in ((given or {}).get("config_groups") or {}).values():
        if found := group.get("input_activations"):
            return "fp8" if found.get("type") == "float" else "int8"
    return None


def dense_tensors(tensors: Mapping[str, Stored], given: Mapping[str, Any], place: str) -> dict[str, Stored]:
    """The tensors with every quantised matrix under its plain name.

    Raises:
      UserError: parts of a matrix are missing or do not fit each other.
    """
    out: dict[str, Stored] = {}
    gptq = given.get("quant_method") == "gptq"
    inner = ("qweight", "qzeros", "scales", "g_idx") if gptq else ("weight_scale",)
    for name, t in tensors.items():
        module, _, part = name.rpartition(".")
        if part in inner or (gptq and part == "bias" and f"{module}.qweight" in tensors and not t.open().any()):
            continue  # AutoGPTQ gives every module a bias of zeros
        out[name] = (
            _Scaled(t, tensors[scale]) if (scale := f"{module}.weight_scale") in tensors and part == "weight" else t
        )
    for name in (n for n in tensors if gptq and n.endswith(".qweight")):
        module = name.removesuffix(".qweight")
        if missing := [p for p in inner if f"{module}.{p}" not in tensors]:
            raise UserError(f"{place}: {module} has no {', '.join(missing)}; copy or download the folder again")
        out[f"{module}.weight"] = whole = _Gptq({p: tensors[f"{module}.{p}"] for p in inner}, given["bits"])
        n_out, n_in = whole.shape
        G, width = tensors[f"{module}.scales"].shape
        zeros, group_I = tensors[f"{module}.qzeros"], tensors[f"{module}.g_idx"]
        if width != n_out or zeros.shape != (G, n_out * given["bits"] // _WORD) or group_I.shape != (n_in,):
            raise UserError(f"{place}: the tensors of {module} do not fit each other; copy or download it again")
        if len(found := group_I.open()) and not 0 <= found.min() <= found.max() < G:
            raise UserError(f"{place}: {module}.g_idx names groups that are not there; copy or download it again")
    return out
