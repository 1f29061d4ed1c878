"""Tokenizers of foreign LLaMAs as Hugging Face files: llama2.c's `tok*.bin`, Meta's two kinds of `tokenizer.model`.

llama2.c's is a list of pieces and scores (https://github.com/karpathy/llama2.c, tokenizer.py), of which a sentencepiece
model is made. LLaMA 1 and 2 have a sentencepiece model, LLaMA 3 the ranks of tiktoken
(https://github.com/meta-llama/llama-models), which become a byte-level `tokenizer.json`.
"""

import base64
import json
import re
import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from jaxtune.errors import UserError

Text = TypeVar("Text", str, bytes)
_AGAIN = "copy or download the file again"
_FIRST = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{b:02X}>" for b in range(256)]
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NAMED = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
_LLAMA31_NAMED = {**_LLAMA3_NAMED, 4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
_LLAMA3_SPECIALS = 256


def from_llama2c(file: Path, vocab: int, context: int) -> dict[str, bytes]:
    """The sentencepiece model of a llama2.c tokenizer with `vocab` tokens, and its tokenizer_config.json.

    Raises:
      UserError: the file is missing, damaged, or holds another number of tokens.
    """
    pb, blob, at = _protobuf(), _read(file), 4
    pieces: list[tuple[bytes, float]] = []
    while at + 8 <= len(blob) and len(pieces) <= vocab:
        score, n = struct.unpack_from("<fi", blob, at)
        if n < 0 or at + 8 + n > len(blob):
            break
        pieces.append((blob[at + 8 : at + 8 + n], score))
        at += 8 + n
    if at != len(blob) or len(pieces) != vocab:
        raise UserError(f"{file}: is no llama2.c tokenizer of the model's {vocab} tokens; give the model's own")
    model, kind = pb.ModelProto(), pb.ModelProto.SentencePiece
    kinds = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *[kind.BYTE] * 256, *[kind.NORMAL] * vocab][:vocab]
    for i, (raw, score) in enumerate(pieces):
        try:
            text = raw.decode().replace(" ", "▁")
        except UnicodeDecodeError as e:
            raise UserError(f"{file}: token {i} is not UTF-8; {_AGAIN}") from e
        if i < 259:
            text = text.strip()  # llama2.c stores "\n<s>\n"
            if text != (wanted := [*_FIRST, *_BYTES][i]):
                raise UserError(f"{file}: token {i} is {text[:20]!r}, not {wanted!r} as in every LLaMA; {_AGAIN}")
        model.pieces.add(piece=text, score=score, type=kinds[i])
    spec = model.trainer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback = pb.TrainerSpec.BPE, vocab, True
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = 0, 1, 2, -1
    norm = model.normalizer_spec
    norm.name, norm.add_dummy_prefix, norm.remove_extra_whitespaces = "identity", True, False
    norm.escape_whitespaces = True
    return _sentencepiece_side(file, model.SerializeToString(), model, context)


def from_meta(file: Path, vocab: int, context: int, scaled: bool = False) -> dict[str, bytes]:
    """Meta's tokenizer.model as a tokenizer.json; it is copied too where it is sentencepiece's.

    `scaled` says that the model is LLaMA 3.1 or later, which gave names to three more of the special tokens.

    Raises:
      UserError: the file is missing, damaged, or holds more tokens than the model.
    """
    blob = _read(file)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", blob):
        ranks = _read_ranks(file, blob)
        size, model = len(ranks) + _LLAMA3_SPECIALS, None
    else:
        from google.protobuf.message import DecodeError

        try:
            model = _protobuf().ModelProto.FromString(blob)
        except DecodeError as e:
            raise UserError(f"{file}: neither a sentencepiece model nor tiktoken's ranks; {_AGAIN}") from e
        size = len(model.pieces)
    if not 0 < size <= vocab:
        raise UserError(f"{file}: has {size} tokens, the model {vocab}; put the model's own tokenizer there")
    if model is None:
        return {"tokenizer.json": _byte_level(ranks, scaled), **_byte_level_config(context)}
    return _sentencepiece_side(file, blob, model, context)


def _protobuf() -> Any:
    """The classes of sentencepiece's format; made as they are imported, so that no type checker knows them."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}); name the model's tokenizer") from e


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def _byte_level_config(context: int) -> dict[str, bytes]:
    config = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {"tokenizer_config.json": _json(config)}


def last_merge(token: Text, ranks: Mapping[Text, int]) -> tuple[Text, Text] | None:
    """The two parts that byte-pair encoding joins into `token`; None for a single sign, or where it never makes it.

    tiktoken and sentencepiece join any two neighbours whose sum is a token, of lowest rank first. What happens within a
    token does not depend on what stands around it until a part is joined to a sign outside, so these two are the only
    ones that can ever be joined into it.

    >>> last_merge("abc", {"bc": 0, "ab": 1, "abc": 2})
    ('a', 'bc')
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank >= ranks[token]:
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


# --- sentencepiece --------------------------------------------------------------------------------------------------


def _sentencepiece_side(file: Path, blob: bytes, model: Any, context: int) -> dict[str, bytes]:
    """The model itself; a tokenizer.json, because transformers 5 joins spaces otherwise when it has to make its own."""
    if [p.piece for p in model.pieces[:3]] != _FIRST or model.trainer_spec.model_type != _protobuf().TrainerSpec.BPE:
        raise UserError(f"{file}: not a LLaMA's: it should be byte-pair encoding that starts with {', '.join(_FIRST)}")
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    side = {"tokenizer.model": blob, "tokenizer.json": _sentencepiece_json(model)}
    return side | {"tokenizer_config.json": _json(config)}


def _sentencepiece_json(model: Any) -> bytes:
    import tokenizers
    from tokenizers import decoders, models, normalizers, processors

    kind = _protobuf().ModelProto.SentencePiece
    vocab = {p.piece: i for i, p in enumerate(model.pieces)}
    normal = sorted((p for p in model.pieces if p.type == kind.NORMAL), key=lambda p: -p.score)
    ranks = {p.piece: i for i, p in enumerate(normal)}
    pairs = [last_merge(piece, ranks) for piece in ranks]
    merges = [pair for pair in pairs if pair and pair[0] in vocab and pair[1] in vocab]
    t = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=_FIRST[0], fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    t.add_special_tokens([tokenizers.AddedToken(s, special=True, normalized=False) for s in _FIRST])
    t.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return t.to_str().encode()


# --- tiktoken's ranks -----------------------------------------------------------------------------------------------


def _read_ranks(file: Path, blob: bytes) -> dict[bytes, int]:
    """Tokens by rank, in order: a line is the token in base64, a space, its rank."""
    try:
        pairs = [line.split() for line in blob.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as e:
        raise UserError(f"{file}: a line is not of a token in base64 and its rank ({e}); {_AGAIN}") from e
    whole = list(ranks.values()) == list(range(len(pairs))) and all(bytes([b]) in ranks for b in range(256))
    if not whole or b"" in ranks:
        raise UserError(f"{file}: ranks are not 0, 1, 2, … of all bytes and what is made of them; {_AGAIN}")
    return ranks


def _byte_level(ranks: Mapping[bytes, int], scaled: bool) -> bytes:
    """The tokenizer.json of LLaMA 3."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's alphabet: other bytes get letters past 255
    letters = {b: chr(b) for b in shown}
    letters |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letters)}

    def text(token: bytes) -> str:
        return "".join(letters[b] for b in token)

    merges = [(text(pair[0]), text(pair[1])) for token in ranks if (pair := last_merge(token, ranks))]
    vocab = {text(token): rank for token, rank in ranks.items()}
    t = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_SPLIT), "isolated")
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    t.decoder = decoders.ByteLevel()
    named, specials = _LLAMA31_NAMED if scaled else _LLAMA3_NAMED, []
    for i in range(_LLAMA3_SPECIALS):
        reserved = f"reserved_special_token_{i - sum(n < i for n in named)}"
        specials.append(f"<|{named.get(i, reserved)}|>")
    t.add_special_tokens([tokenizers.AddedToken(s, special=True, normalized=False) for s in specials])
    t.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{specials[0]} $A",
                pair=f"{specials[0]} $A {specials[0]}:1 $B:1",
                special_tokens=[(specials[0], len(ranks))],
            ),
        ]
    )
    return t.to_str().encode()
