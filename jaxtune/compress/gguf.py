"""GGUF, llama.cpp's one file of a model: its sizes, its tokenizer, and its tensors under other names.

What is not as in Hugging Face's files: LLaMA's rows of queries and keys turn in pairs of neighbours instead of halves,
Gemma's norms have their one added, and LLaMA 3's and LongRoPE's frequencies are tensors.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import log
from jaxtune.compress import gguf_words, q4_k
from jaxtune.errors import UserError
from jaxtune.hf import layout, tokenizer
from jaxtune.hf.files import Entry
from jaxtune.layers import Rope
from jaxtune.models.decoder import DecoderConfig

DTYPES = ("f16", "q8_0", "q4_0", "q4_k")
_ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2",
    "gemma3_text": "gemma3", "phi3": "phi3",
}  # fmt: skip
_FILE_TYPES = {"f16": 1, "q8_0": 7, "q4_0": 2, "q4_k": 14}
_PAIRS = re.compile(r"\.self_attn\.([qk])_proj\.(weight|bias)$")
TABLES = (layout.EMBED, layout.HEAD)
_PERIODS = {"gemma2": 2, "gemma3_text": 6}  # of layers with and without a window, as llama.cpp has them


def _package() -> Any:
    try:
        import gguf
    except ImportError as e:
        raise UserError("--format gguf needs the gguf package; pip install 'jaxtune[gguf]'") from e
    return gguf


def check(c: DecoderConfig) -> str:
    """The name that llama.cpp has for a model's architecture.

    Raises:
      UserError: it has none, or computes something of it otherwise.
    """
    _package()
    if (name := _ARCHITECTURES.get(c.family)) is None or c.experts:
        raise UserError(
            f"--format gguf: {c.family}{' with experts' if c.experts else ''} is not written; "
            f"{', '.join(_ARCHITECTURES)} are"
        )
    odd = None
    own = {c.head**-0.5, (c.embed / c.heads) ** -0.5 if (c.family, c.layers) in _LARGE else c.head**-0.5}
    if c.attention_scale is not None and min(abs(c.attention_scale - x) for x in own) > 1e-6:
        odd = f"attention is scaled by {c.attention_scale:g}"
    if (period := _PERIODS.get(c.family)) and any(bool(w) != bool((i + 1) % period) for i, w in enumerate(c.windows)):
        odd = f"its windows do not come every {period} layers"
    if len(c.ropes) > 1 and (c.ropes[1] is None or c.ropes[1].theta != 10_000.0 or c.ropes[1].kind != "default"):
        odd = "layers with a window turn by another base than 10000"
    if c.ropes[0] is None or c.ropes[0].kind not in ("default", "linear", "llama3", "yarn", "longrope"):
        odd = f"rope of kind {getattr(c.ropes[0], 'kind', None)}"
    if c.family == "qwen2" and c.windows:
        odd = "layers with a window"
    if odd:
        raise UserError(f"--format gguf: {odd}, which llama.cpp does not do for {name}; keep the Hugging Face folder")
    if name == "llama" and any(c.windows):
        log.warn(
            f"llama.cpp knows no window for {c.family}: beyond {max(c.windows)} tokens it sees more than the model did"
        )
    return name


_LARGE = {("gemma2", 46), ("gemma3_text", 62)}  # whose attention is scaled by the width of a head of the embedding


def write(
    file: Path,
    c: DecoderConfig,
    tensors: Mapping[str, Entry],
    words_folder: Path,
    dtype: str,
    name: str,
    template: str | None = None,
    said: Callable[[int], None] = lambda n: None,
) -> dict[str, str]:
    """Write a model as one GGUF file, one tensor in memory at a time.

    Args:
      file: to write.
      c: the model's shape.
      tensors: by their Hugging Face names.
      words_folder: where its tokenizer lies.
      dtype: of matrices: f16, q8_0, q4_0 or q4_k. Tables are in f16 or q8_0, what is no matrix in float32.
      name: of the model.
      template: the chat template.
      said: is told how many bytes were written.

    Returns: the type of each tensor, by its Hugging Face name; where rows do not divide into blocks it is another one.

    Raises:
      UserError: llama.cpp does not know the architecture, or the tokenizer.
    """
    gguf, arch = _package(), check(c)
    writer = gguf.GGUFWriter(file, arch)
    writer.add_name(name)
    _sizes(writer, gguf, c)
    tensors = _plain(tensors, c)
    rows = tensors[layout.EMBED].shape[0]
    gguf_words.write(writer, tokenizer.load(words_folder), words_folder, rows, template)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_FILE_TYPES[dtype])
    extra = {n: Entry(x.shape, x.dtype, functools.partial(np.asarray, x)) for n, x in _frequencies(c.ropes[0]).items()}
    plan = [(_their_name(gguf, arch, c, n), n, e) for n, e in tensors.items()]
    types = {n: kind(n, e.shape, dtype) for _, n, e in plan}
    for theirs, ours, entry in [*plan, *((n, n, e) for n, e in extra.items())]:
        t = gguf.GGMLQuantizationType[types.get(ours, "F32")]
        block, size = gguf.GGML_QUANT_SIZES[t]
        shape = (*entry.shape[:-1], entry.shape[-1] // block * size)
        held = np.dtype({"F32": np.float32, "F16": np.float16}.get(t.name, np.uint8))
        nbytes = int(np.prod(entry.shape)) // block * size
        writer.add_tensor_info(theirs, entry.shape if block == 1 else shape, held, nbytes, t)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, ours, entry in [*plan, *((n, n, e) for n, e in extra.items())]:
        data = encode(to_theirs(ours, entry.data(), c), types.get(ours, "F32"))
        writer.write_tensor_data(data)
        said(data.nbytes)
    writer.close()
    return types


def kind(name: str, shape: Sequence[int], dtype: str) -> str:
    """The type of a tensor where matrices are to be of `dtype`.

    >>> kind("model.layers.0.mlp.up_proj.weight", (64, 512), "q4_k"), kind("model.norm.weight", (512,), "q4_k")
    ('Q4_K', 'F32')
    """
    if len(shape) < 2:
        return "F32"
    if dtype == "f16" or shape[-1] % 32:
        return "F16"
    if name in TABLES:
        return "Q8_0"
    if dtype == "q4_k" and shape[-1] % q4_k.SUPER:
        return "Q5_0"  # as llama.cpp does
    return dtype.upper()


def encode(x: np.ndarray, kind: str) -> np.ndarray:
    """A tensor in a type of GGUF's: float16, float32, or bytes."""
    if kind in ("F32", "F16"):
        return np.ascontiguousarray(x.astype(np.float32 if kind == "F32" else np.float16))
    x = np.ascontiguousarray(x.astype(np.float32))
    if kind == "Q4_K":
        return q4_k.quantize(x)
    gguf = _package()
    return gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind])


class Held:
    """A tensor of a GGUF file under its Hugging Face name, dense in float32 when it is asked for."""

    def __init__(self, tensor: Any, name: str, c: DecoderConfig) -> None:
        self.tensor, self.name, self.c, self.dtype = tensor, name, c, np.dtype(np.float32)
        self.shape = tuple(int(n) for n in reversed(tensor.shape))

    def open(self) -> np.ndarray:
        x = _package().quants.dequantize(self.tensor.data, self.tensor.tensor_type).reshape(self.shape)
        return from_theirs(self.name, x.astype(np.float32), self.c)


def read(file: Path, c: DecoderConfig) -> dict[str, Held]:
    """The tensors of a file that `write` wrote of a model of this shape, by their Hugging Face names."""
    gguf = _package()
    arch = check(c)
    there = {t.name: t for t in gguf.GGUFReader(file).tensors}
    names = [layout.EMBED, "model.norm.weight", *([] if c.tied else [layout.HEAD])]
    for i in range(c.layers):
        names += [f"model.layers.{i}.{n}" for n in _layer_names(there, gguf, arch, c, i)]
    found = {n: there.get(_their_name(gguf, arch, c, n)) for n in names}
    return {n: Held(t, n, c) for n, t in found.items() if t is not None}


def _layer_names(there: Mapping[str, Any], gguf: Any, arch: str, c: DecoderConfig, i: int) -> list[str]:
    modules = "qkv_proj o_proj" if c.fused else "q_proj k_proj v_proj o_proj q_norm k_norm"
    parts = [f"self_attn.{m}" for m in modules.split()]
    parts += [f"mlp.{m}" for m in ("gate_up_proj down_proj" if c.fused else "gate_proj up_proj down_proj").split()]
    norms = "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm"
    leaves = [f"{p}.{leaf}" for p in [*parts, *norms.split()] for leaf in ("weight", "bias")]
    known = _names(gguf, arch, c)
    return [n for n in leaves if (t := known(f"model.layers.{i}.{n}")) is not None and t in there]


# --- what is other there ----------------------------------------------------------------------------------------------


def to_theirs(name: str, x: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """A tensor of Hugging Face's files as GGUF holds it."""
    if _ARCHITECTURES[c.family] == "llama" and (m := _PAIRS.search(name)):
        heads = c.heads if m[1] == "q" else c.kv_heads
        return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
    if c.norm_around_one and name.endswith("norm.weight"):
        return x.astype(np.float32) + 1
    return x


def from_theirs(name: str, x: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """The opposite of `to_theirs`."""
    if _ARCHITECTURES[c.family] == "llama" and (m := _PAIRS.search(name)):
        heads = c.heads if m[1] == "q" else c.kv_heads
        return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
    if c.norm_around_one and name.endswith("norm.weight"):
        return x - 1
    return x


def _plain(tensors: Mapping[str, Entry], c: DecoderConfig) -> dict[str, Entry]:
    """Without buffers, and of a table that is the head too, under whichever name, the table alone."""
    out = {n: e for n, e in tensors.items() if not layout.UNTRAINED.search(n)}
    if c.tied and (head := out.pop(layout.HEAD, None)) is not None:
        out.setdefault(layout.EMBED, head)
    return out


def _names(gguf: Any, arch: str, c: DecoderConfig) -> Callable[[str], str | None]:
    number = next(n for n, found in gguf.MODEL_ARCH_NAMES.items() if found == arch)
    known = gguf.get_tensor_name_map(number, c.layers)
    return lambda name: known.get_name(name, try_suffixes=(".weight", ".bias"))


def _their_name(gguf: Any, arch: str, c: DecoderConfig, name: str) -> str:
    if (found := _names(gguf, arch, c)(name)) is None:
        raise UserError(f"--format gguf: {name} has no name in llama.cpp's {arch}; keep the Hugging Face folder")
    return found


def _sizes(w: Any, gguf: Any, c: DecoderConfig) -> None:
    rope = c.ropes[0]
    assert rope is not None
    w.add_context_length(c.context)
    w.add_embedding_length(c.embed)
    w.add_block_count(c.layers)
    w.add_feed_forward_length(c.mlp)
    w.add_head_count(c.heads)
    w.add_head_count_kv(c.kv_heads)
    w.add_key_length(c.head)
    w.add_value_length(c.head)
    w.add_rope_dimension_count(rope.dim)
    w.add_rope_freq_base(rope.theta)
    w.add_layer_norm_rms_eps(c.norm_eps)
    w.add_vocab_size(c.vocab)
    if _ARCHITECTURES[c.family] != "llama" and any(c.windows):
        w.add_sliding_window(max(c.windows))
    if c.attention_softcap:
        w.add_attn_logit_softcapping(c.attention_softcap)
    if c.logit_softcap:
        w.add_final_logit_softcapping(c.logit_softcap)
    if rope.kind in ("linear", "yarn"):
        w.add_rope_scaling_type(gguf.RopeScalingType(rope.kind))
        w.add_rope_scaling_factor(rope.factor)
    if rope.kind in ("yarn", "longrope"):
        w.add_rope_scaling_orig_ctx_len(rope.context)
    if rope.kind == "longrope":
        w.add_rope_scaling_attn_factors(rope.attention_factor)


def _frequencies(rope: Rope | None) -> dict[str, np.ndarray]:
    """What the rotary frequencies are divided by, where that is a tensor."""
    if rope is not None and rope.kind == "longrope":
        both = {"long": rope.long_factor, "short": rope.short_factor}
        return {f"rope_factors_{n}.weight": np.array(f, np.float32) for n, f in both.items()}
    if rope is None or rope.kind != "llama3":
        return {}
    wavelength = 2 * np.pi * rope.theta ** (np.arange(0, rope.dim, 2) / rope.dim)
    low, high = rope.context / rope.low_freq_factor, rope.context / rope.high_freq_factor
    smooth = (rope.context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = 1 / ((1 - smooth) / rope.factor + smooth)
    factors = np.where(wavelength < high, 1.0, np.where(wavelength > low, rope.factor, between))
    return {"rope_freqs.weight": factors.astype(np.float32)}
