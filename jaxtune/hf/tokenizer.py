"""Tokenizers of model folders, by transformers: the ids here are those that the exported model will get there."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.errors import UserError
from jaxtune.hf import foreign_tokenizers

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load(folder: Path) -> Any:
    """The folder's tokenizer as transformers builds it, with its special tokens and its chat template, if it has one.

    A folder with a LLaMA's `tokenizer.model` alone (sentencepiece or tiktoken) gives the ids that those programs give.

    Raises:
      UserError: there is no tokenizer, or it is damaged.
    """
    if not any((folder / f).exists() for f in FILES):
        raise UserError(f"{folder}: has no tokenizer; one of {', '.join(FILES)} was expected")
    made: Mapping[str, bytes] = {}
    model = folder / "tokenizer.model"
    if model.exists() and not (folder / "tokenizer.json").exists():
        with contextlib.suppress(UserError):  # not a LLaMA's: left to transformers, which tells what is wrong with it
            made = foreign_tokenizers.from_meta(model, vocab=2**31, context=2**31)
    if made:
        with tempfile.TemporaryDirectory() as tmp:
            for f in folder.iterdir():
                if f.is_file() and f.suffix in (".json", ".jinja"):
                    shutil.copyfile(f, Path(tmp) / f.name)
            for name, blob in made.items():
                if not (Path(tmp) / name).exists():
                    (Path(tmp) / name).write_bytes(blob)
            tokenizer = _open(Path(tmp), folder, "PreTrainedTokenizerFast")  # others make theirs anew
    else:
        tokenizer = _open(folder, folder, "PreTrainedTokenizerFast" if _is_plain(folder) else "AutoTokenizer")
    tokenizer.model_max_length = int(1e30)  # rows are cut to data.max_length here, so its warning would mislead
    if isinstance(tokenizer.chat_template, dict):  # several by name
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    return tokenizer


def _is_plain(folder: Path) -> bool:
    """Whether a LLaMA's folder names the general class: AutoTokenizer takes it too, after it has imported torch."""
    named = _read_json(folder / "tokenizer_config.json")
    return (
        named.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
        and "auto_map" not in named
        and (folder / "tokenizer.json").exists()
        and _read_json(folder / "config.json").get("model_type") == "llama"
    )


def _open(folder: Path, place: Path, kind: str) -> Any:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it misses torch, which is not needed
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(folder, trust_remote_code=False)
    except Exception as e:  # the tokenizers library raises bare Exception on a damaged file
        raise UserError(f"{place}: the tokenizer cannot be read ({' '.join(str(e).split())[:200]})") from e


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except json.JSONDecodeError as e:
        raise UserError(f"{file}: not JSON ({e}); copy or download it again") from e


def eos_ids(folder: Path, tokenizer: Any) -> list[int]:
    """Token ids that end a text: those of generation_config.json, config.json and the tokenizer."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        ids += value if isinstance(value, list) else [value] if value is not None else []
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return sorted(set(ids))


def pad_id(folder: Path) -> int | None:
    """The id of the padding token of a folder's tokenizer, None where it has none."""
    return load(folder).pad_token_id if any((folder / f).exists() for f in FILES) else None


def add(tokenizer: Any, tokens: Sequence[str], special: Sequence[str]) -> None:
    """Add tokens that are not there yet."""
    if tokens:
        tokenizer.add_tokens(list(tokens))
    if special:
        tokenizer.add_special_tokens({"extra_special_tokens": list(special)}, replace_extra_special_tokens=False)


def check_size(tokenizer: Any, rows: int, place: str) -> None:
    """Raises: UserError: the tokenizer has more tokens than the model has embeddings."""
    if (wanted := size(tokenizer)) > rows:
        raise UserError(
            f"{place}: the tokenizer has {wanted} tokens, the model {rows} embeddings; take the tokenizer that belongs "
            "to the model, or set vocabulary.grow=true in training"
        )


def size(tokenizer: Any) -> int:
    """One more than the largest id."""
    return max(tokenizer.get_vocab().values()) + 1


def first_difference(a: Any, b: Any) -> tuple[int, str | None, str | None] | None:
    """The first id for which two tokenizers have not the same token, and what they have; special tokens count too.

    How text is cut into these tokens is not compared: only one of the two will do so.
    """
    mine, other = ({i: t for t, i in x.get_vocab().items()} for x in (a, b))
    ids = (i for i in sorted({*mine, *other}) if mine.get(i) != other.get(i))
    return next(((i, mine.get(i), other.get(i)) for i in ids), None)
