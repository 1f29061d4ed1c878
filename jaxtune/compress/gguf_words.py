"""A tokenizer as GGUF holds it: tokens, their kinds, scores or merges, and how text is split before."""

import json
import re
from pathlib import Path
from typing import Any

from jaxtune.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # gguf.TokenType
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
# what llama.cpp calls the ways in which byte-level tokenizers split text first
_SPLITS = {
    _ENGLISH + r"\p{N}{1,3}|" + _TAIL: "llama-bpe",
    _ENGLISH + r"\p{N}|" + _TAIL: "qwen2",
}


def write(writer: Any, words: Any, folder: Path, rows: int, template: str | None) -> None:
    """Put a tokenizer of transformers into a `gguf.GGUFWriter`.

    Args:
      writer: of the file.
      words: the tokenizer.
      folder: it is from, where a sentencepiece model may lie.
      rows: of the token table; ids beyond the tokenizer's are marked as unused.
      template: the chat template.

    Raises:
      UserError: llama.cpp has no tokenizer of this kind.
    """
    made = json.loads(words.backend_tokenizer.to_str())
    if made["model"]["type"] != "BPE":
        raise UserError(f"{folder}: a tokenizer of kind {made['model']['type']} is not written to GGUF; only BPE is")
    added = {t["id"]: t for t in made["added_tokens"]}
    names = {i: t for t, i in words.get_vocab().items()}
    tokens = [names.get(i, f"[PAD{i}]") for i in range(rows)]
    sentencepiece = bool(made["model"].get("byte_fallback"))

    def kind(i: int) -> int:
        if i not in names:
            return UNUSED
        if sentencepiece and tokens[i] == words.unk_token:
            return UNKNOWN
        if i in added:
            return CONTROL if added[i]["special"] else USER_DEFINED
        return BYTE if sentencepiece and _BYTE_PIECE.fullmatch(tokens[i]) else NORMAL

    kinds = [kind(i) for i in range(rows)]
    merges = [" ".join(m) if isinstance(m, list) else m for m in made["model"]["merges"]]
    if sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, kinds, merges, folder / "tokenizer.model"))
        # by what it does: a normalizer may put the space there, or Metaspace, by its scheme
        writer.add_add_space_prefix((words.tokenize("a") or [""])[0].startswith("▁"))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(made["pre_tokenizer"], str(folder)))
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name in ("bos", "eos", "unk", "pad"):
        if (i := getattr(words, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    start, end = _around(words)
    writer.add_add_bos_token(start)
    writer.add_add_eos_token(end)
    if template:
        writer.add_chat_template(template)


def split_name(pre_tokenizer: Any, place: str) -> str:
    """What llama.cpp calls a byte-level tokenizer's way of splitting.

    >>> split_name({"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}, "here")
    'gpt-2'

    Raises:
      UserError: it has no name for it that is known here.
    """
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    splits = [p["pattern"].get("Regex", p["pattern"].get("String")) for p in parts if p["type"] == "Split"]
    kinds = [p["type"] for p in parts]
    if kinds == ["Split", "ByteLevel"] and splits[0] in _SPLITS:
        return _SPLITS[splits[0]]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        return "smollm"
    raise UserError(
        f"{place}: llama.cpp's name for how this tokenizer splits text is not known here; convert the folder with "
        "llama.cpp's convert_hf_to_gguf.py"
    )


def _scores(tokens: list[str], kinds: list[int], merges: list[str], model: Path) -> list[float]:
    """Of sentencepiece: those of its model, or the less the later a token is made by a merge."""
    if model.exists():
        import sentencepiece

        try:
            processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError) as e:
            raise UserError(f"{model}: no sentencepiece model ({' '.join(str(e).split())[:100]}); copy it again") from e
        n = processor.get_piece_size()
        own = {processor.id_to_piece(i): processor.get_score(i) for i in range(n)}
        return [own.get(t, 0.0 if k != NORMAL else -1e4) for t, k in zip(tokens, kinds, strict=True)]
    first: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        first.setdefault(merge.replace(" ", ""), -float(rank))
    return [first.get(t, 0.0 if k != NORMAL else -1e4) for t, k in zip(tokens, kinds, strict=True)]


def _around(words: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts its first token before a text, and its last behind."""
    ids = words("a").input_ids
    return bool(ids) and ids[0] == words.bos_token_id, bool(ids) and ids[-1] == words.eos_token_id
