"""LLaMAs in formats other than Hugging Face's, read as Hugging Face tensors, one at a time.

llama2.c's `.bin` (https://github.com/karpathy/llama2.c, export.py): a header, then float32 in a fixed order.
Meta's `params.json` with `consolidated.*.pth`: pickles, each of which holds a slice of most tensors. In both the rotary
embedding turns neighbouring pairs of a head's coordinates; Hugging Face's turns coordinate i with i + H/2, so the rows
of the query and key matrices are put in that order.

Dimensions: D embed, N query heads, K key/value heads, H head dim, F mlp, V vocab, O rows of a matrix, I its columns.
"""

import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune import log
from jaxtune.errors import UserError
from jaxtune.hf import files, foreign_tokenizers, meta
from jaxtune.layers import Rope
from jaxtune.models import families
from jaxtune.models.decoder import DecoderConfig

_AGAIN = "copy or download the file again"
_V1_MAGIC = 0x616B3432  # "ak42"
_V0_ORDER = "embed input_norm q k v o post_norm gate down up norm rope head".split()
_V1_ORDER = "input_norm post_norm norm embed q k v o gate down up head".split()
_HF = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "input_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "post_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
}
_META = {
    "embed": "tok_embeddings.weight",
    "norm": "norm.weight",
    "head": "output.weight",
    "input_norm": "layers.{}.attention_norm.weight",
    "q": "layers.{}.attention.wq.weight",
    "k": "layers.{}.attention.wk.weight",
    "v": "layers.{}.attention.wv.weight",
    "o": "layers.{}.attention.wo.weight",
    "post_norm": "layers.{}.ffn_norm.weight",
    "gate": "layers.{}.feed_forward.w1.weight",
    "up": "layers.{}.feed_forward.w3.weight",
    "down": "layers.{}.feed_forward.w2.weight",
}
_SPLIT = {"q": 0, "k": 0, "v": 0, "gate": 0, "up": 0, "head": 0, "o": 1, "down": 1}  # the axis that shards divide


class Foreign(NamedTuple):
    """A model as a Hugging Face folder would hold it."""

    config: dict[str, Any]  # config.json
    tensors: dict[str, files.Entry]
    side: dict[str, bytes]  # the tokenizer's files, by name; empty where there is no tokenizer


def open_llama2c(file: Path, tokenizer: Path | None = None) -> Foreign:
    """A llama2.c checkpoint of float32: the legacy layout, or version 1.

    The tokenizer is `tokenizer`, or else the only `tok*.bin` beside the file, or `tokenizer.model`. Without one there
    is a warning. Generation ends at `</s>` and at `<s>`, as in llama2.c.

    Raises:
      UserError: the file is missing, quantised or not of the size that its header asks for, or the tokenizer does not
        fit.
    """
    try:
        with file.open("rb") as f:
            header = f.read(256).ljust(256, b"\0")
        size = file.stat().st_size
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}); give a llama2.c .bin file") from e
    magic, version = struct.unpack_from("<Ii", header)
    if magic != _V1_MAGIC:
        D, F, L, N, K, V, context = struct.unpack_from("<7i", header)
        tied, V, start, order = V > 0, abs(V), 28, _V0_ORDER
    elif version == 1:
        D, F, L, N, K, V, context, shared = struct.unpack_from("<7iB", header, 8)
        tied, start, order = bool(shared), 256, _V1_ORDER
    else:
        what = "int8, quantised" if version == 2 else "unknown"
        raise UserError(f"{file}: llama2.c version {version} ({what}) is not read; export it with --version 1 or 0")
    if min(D, F, L, N, K, V, context) <= 0 or D % N or N % K or D // N % 2:
        raise UserError(f"{file}: no llama2.c checkpoint (header {D, F, L, N, K, V, context}); {_AGAIN}")
    c = DecoderConfig(V, D, L, N, K, D // N, F, (Rope(D // N, context=context),), context, tied=tied)
    shapes = _shapes(c) | {"rope": (context, c.head)}  # its cosines and sines, half of the columns each
    counts = {kind: L if "{}" in _HF.get(kind, "") else 1 for kind in order if kind != "head" or not tied}
    wanted = start + 4 * sum(prod(shapes[kind]) * n for kind, n in counts.items())
    if wanted != size:
        raise UserError(f"{file}: has {size} bytes, its llama2.c header asks for {wanted}; {_AGAIN}")
    tensors = {}
    for kind, n in counts.items():
        for i in range(n):
            if kind in _HF:
                part = files.Tensor(file, np.dtype("float32"), shapes[kind], start)
                tensors[_HF[kind].format(i)] = _entry([part], None, _heads(c, kind))
            start += 4 * prod(shapes[kind])
    config = families.to_hf(c) | {"bos_token_id": 1, "eos_token_id": [1, 2]}
    return Foreign(config, tensors, _llama2c_side(file, tokenizer, c))


def open_meta(folder: Path) -> Foreign:
    """A folder of Meta's, in one or many model-parallel shards.

    The files do not tell LLaMA 1 from 2, nor a base model from a chat model: the context is `max_seq_len` of
    params.json where it stands, or else 4096 (8192 with the vocabulary of LLaMA 3, 131072 with scaled rotary
    embeddings), and generation ends at the end of a text as well as of a turn. Head and embedding are tied where they
    are equal bit by bit. The tokenizer is `tokenizer.model` in the folder or in the one above it; without one there
    is a warning.

    Raises:
      UserError: a file is missing or damaged, the model is not a dense text LLaMA, or tensors do not fit params.json.
    """
    params = meta.read_params(folder / "params.json")
    shards = meta.read_shards(folder)
    kinds = {_META[k].format(i): (k, i) for k in _META for i in range(params["n_layers"] if "{}" in _META[k] else 1)}
    first = shards[0]
    if faults := [
        f"{title}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for title, names in (
            ("missing", [n for n in kinds if n not in first and n != _META["head"]]),
            ("unexpected", sorted(set(first) - set(kinds))),
        )
        if names
    ]:
        raise UserError(f"{folder}: tensors do not fit params.json; {'; '.join(faults)}")
    parts = {kinds[name]: [shard[name] for shard in shards] for name in first}
    for (kind, i), pieces in parts.items():
        if odd := [p.shape for p in pieces if len(p.shape) != (1 if "norm" in kind else 2)]:
            raise UserError(f"{folder}: {_META[kind].format(i)!r} has shape {list(odd[0])}; {_AGAIN}")
    c = _meta_config(folder, params, parts)
    shapes, tensors = _shapes(c), {}
    for (kind, i), pieces in parts.items():
        axis = _axis(kind, pieces, c.embed)
        tensors[_HF[kind].format(i)] = entry = _entry(pieces, axis, _heads(c, kind))
        rest = {tuple(n for a, n in enumerate(p.shape) if a != axis) for p in pieces}
        if entry.shape != shapes[kind] or len(rest) > 1 or len({p.dtype for p in pieces}) > 1:
            found = " + ".join(f"{p.dtype}{list(p.shape)}" for p in pieces)
            raise UserError(
                f"{folder}: {_META[kind].format(i)!r} is {found} in {len(shards)} shards, params.json wants "
                f"{list(shapes[kind])}; are all the shards of one model there?"
            )
        if axis is None and any(p.open().tobytes() != pieces[0].open().tobytes() for p in pieces[1:]):
            raise UserError(f"{folder}: {_META[kind].format(i)!r} differs between shards; are they of one model?")
    head, embed = parts.get(("head", 0)), parts["embed", 0]
    tied = head is None or (_axis("embed", embed, c.embed) == 0 and all(map(_same, head, embed)))
    if tied:
        tensors.pop(_HF["head"], None)
    config = families.to_hf(c) | {"tie_word_embeddings": tied, "torch_dtype": embed[0].dtype.name}
    third, scaled = c.vocab >= 128000, bool(params.get("use_scaled_rope"))
    if scaled:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": float(params.get("rope_scaling_factor") or (32.0 if c.embed <= 3072 else 8.0)),  # 3.2, 3.1
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    ends = [128001, 128008, 128009] if scaled else [128001, 128009]
    config |= {"bos_token_id": 128000, "eos_token_id": ends} if third else {"bos_token_id": 1, "eos_token_id": 2}
    place = next((p for p in (folder, folder.parent) if (p / "tokenizer.model").is_file()), None)
    if place is None:
        log.warn(f"{folder}: has no tokenizer.model; copy the model's own beside params.json")
        return Foreign(config, tensors, {})
    return Foreign(config, tensors, foreign_tokenizers.from_meta(place / "tokenizer.model", c.vocab, c.context, scaled))


def half_split(w_OI: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head from interleaved order (0, 1, 2, …) to half-split order (0, 2, …, 1, 3, …).

    >>> half_split(np.arange(8)[:, None], 2).ravel()
    array([0, 2, 1, 3, 4, 6, 5, 7])
    """
    O, I = w_OI.shape
    return w_OI.reshape(heads, O // heads // 2, 2, I).swapaxes(1, 2).reshape(O, I)


def _shapes(c: DecoderConfig) -> dict[str, tuple[int, ...]]:
    D, F, V, NH, KH = c.embed, c.mlp, c.vocab, c.heads * c.head, c.kv_heads * c.head
    norms = dict.fromkeys(("norm", "input_norm", "post_norm"), (D,))
    attention = {"q": (NH, D), "k": (KH, D), "v": (KH, D), "o": (D, NH)}
    return {"embed": (V, D), "head": (V, D), "gate": (F, D), "up": (F, D), "down": (D, F), **attention, **norms}


def _heads(c: DecoderConfig, kind: str) -> int:
    """How many heads of rows are to be put in order, 0 for a tensor that the rotary embedding does not touch."""
    return {"q": c.heads, "k": c.kv_heads}.get(kind, 0)


def _entry(pieces: Sequence[files.Tensor], axis: int | None, heads: int) -> files.Entry:
    """Pieces of a tensor, joined on `axis` (None: all are the same); they are read when the data is asked for."""
    shape = list(pieces[0].shape)
    if axis is not None:
        shape[axis] = sum(p.shape[axis] for p in pieces)

    def data() -> np.ndarray:
        whole = axis is None or len(pieces) == 1
        a = pieces[0].open() if whole else np.concatenate([p.open() for p in pieces], axis)
        return half_split(a, heads) if heads else a

    return files.Entry(tuple(shape), pieces[0].dtype, data)


def _same(a: files.Tensor, b: files.Tensor) -> bool:
    """Whether two tensors are equal bit by bit, read block by block up to the first difference."""
    if a[1:3] != b[1:3]:
        return False
    x, y = (t.open().reshape(-1).view(np.uint8) for t in (a, b))
    return all(np.array_equal(x[i : i + 2**24], y[i : i + 2**24]) for i in range(0, x.size, 2**24))


# --- Meta's folders -------------------------------------------------------------------------------------------------


def _axis(kind: str, pieces: Sequence[files.Tensor], D: int) -> int | None:
    """The axis that shards divide. The embedding's is the columns in LLaMA 1 and 2, the rows in 3."""
    if kind == "embed":
        return 0 if pieces[0].shape[1] == D else 1
    return _SPLIT.get(kind)


def _meta_config(folder: Path, params: Mapping[str, Any], parts: Mapping[Any, Sequence[files.Tensor]]) -> DecoderConfig:
    D, N = params["dim"], params["n_heads"]
    embed = parts["embed", 0]
    rows = _entry(embed, _axis("embed", embed, D), 0).shape[0]
    F = sum(t.shape[0] for t in parts["gate", 0])
    V = rows if params["vocab_size"] == -1 else params["vocab_size"]
    default = 131072 if params.get("use_scaled_rope") else 8192 if V >= 128000 else 4096
    context, theta = params.get("max_seq_len", default), float(params.get("rope_theta", 10000.0))
    kinds = {t.dtype for pieces in parts.values() for t in pieces}
    if odd := [d.name for d in kinds if d.name not in ("float32", "float16", "bfloat16")]:
        raise UserError(f"{folder}: tensors of {odd[0]} are not read; allowed: float32, float16, bfloat16")
    return DecoderConfig(
        vocab=V,
        embed=D,
        layers=params["n_layers"],
        heads=N,
        kv_heads=params["n_kv_heads"],
        head=D // N,
        mlp=F,
        ropes=(Rope(D // N, theta=theta, context=context),),
        context=context,
        norm_eps=params.get("norm_eps", 1e-5),
    )


def _llama2c_side(file: Path, tokenizer: Path | None, c: DecoderConfig) -> dict[str, bytes]:
    beside = sorted(f for f in file.parent.glob("tok*.bin") if f != file)
    model = file.with_name("tokenizer.model")
    found = tokenizer or (beside[0] if len(beside) == 1 else model if model.is_file() else None)
    if found is None:
        several = f"several tokenizers ({', '.join(f.name for f in beside)})" if beside else "no tokenizer"
        log.warn(f"{file}: {several} beside it, none is taken; name the model's own")
        return {}
    if found.suffix == ".model":
        return foreign_tokenizers.from_meta(found, c.vocab, c.context)
    return foreign_tokenizers.from_llama2c(found, c.vocab, c.context)
