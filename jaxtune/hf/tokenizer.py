"""Tokenizers of model folders. A `tokenizer.json` is read as it stands; other kinds go through transformers."""

import json
from pathlib import Path
from typing import Any

from jaxtune.errors import UserError

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load(folder: Path) -> Any:
    """The folder's tokenizer, with its special tokens and its chat template, if it has one.

    `tokenizer.json` is taken literally: transformers 5 rebuilds some tokenizers from their class instead, with other
    ids for some texts.

    Raises:
      UserError: there is no tokenizer, or it is damaged.
    """
    import transformers

    file = folder / "tokenizer.json"
    try:
        if not file.exists():
            if not any((folder / f).exists() for f in FILES):
                raise UserError(f"{folder}: has no tokenizer; one of {', '.join(FILES)} was expected")
            return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config = _read_json(folder / "tokenizer_config.json") | _read_json(folder / "special_tokens_map.json")
        special = {
            name: token["content"] if isinstance(token, dict) else token
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (token := config.get(name)) is not None
        }
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), **special)
        tokenizer.chat_template = _chat_template(folder, config)
        return tokenizer
    except UserError:
        raise
    except Exception as e:  # the tokenizers library raises bare Exception on a damaged file
        raise UserError(f"{folder}: the tokenizer cannot be read ({' '.join(str(e).split())[:200]})") from e


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    if (file := folder / "chat_template.jinja").exists():
        return file.read_text()
    template = _read_json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):  # several by name
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    return template


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
