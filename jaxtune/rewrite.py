"""A model on its way from one folder to another: its tensors when their turn comes, and what lies beside them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune import blueprint, card, job
from jaxtune.errors import UserError
from jaxtune.hf import adapters, cache, files, soft_prompts, tokenizer
from jaxtune.models.decoder import DecoderConfig, abstract_weights
from jaxtune.nodes import soft_prompt
from jaxtune.tuned import Opened


class Source(NamedTuple):
    """A model that can be written."""

    decoder: DecoderConfig
    config: Mapping[str, Any]  # of its config.json
    tensors: Mapping[str, files.Entry]  # by their Hugging Face names
    folders: tuple[Path, ...]  # from which other files are copied; the later win
    side: Mapping[str, bytes]  # other files that are made


def of(opened: Opened, place: str, dtype: np.dtype | None = None) -> Source:
    """What was opened, adapters merged, in this dtype or each tensor's own. `place` is what errors name.

    Raises:
      UserError: it is a prompt, which is no part of the weights, or its tokenizer has more tokens than its table.
    """
    b, tree, side, template, _ = opened
    if soft_prompt.of(tree) is not None:
        raise UserError(
            f"{place}: a prompt is no part of the weights, so there is no whole model with it; use it as an adapter: "
            "`jaxtune chat`, `predict` and `evaluate` take the folder, and so does peft"
        )
    if any((side / f).exists() for f in tokenizer.FILES):
        tokenizer.check_size(tokenizer.load(side), b.decoder.vocab, str(side))
    made = {} if template is None else {"chat_template.jinja": template.encode()}
    folders = (b.folder,) if side == b.folder else (b.folder, side)
    return Source(b.decoder, blueprint.dense_config(b.folder), blueprint.full_tensors(b, tree, dtype), folders, made)


def write(
    folder: Path,
    s: Source,
    dtype: str | None = None,
    to: str = "hf",
    shard_bytes: int = files.SHARD_BYTES,
    said: Callable[[int], None] = lambda n: None,
) -> None:
    """Write all files of a model into a folder that is there; see `files.whole` and `files.resumable`.

    Args:
      folder: where.
      s: the model.
      dtype: what config.json is to say of the tensors, where they were cast.
      to: "hf", or "orbax" for a cache.
      shard_bytes: the largest safetensors file.
      said: is told how many bytes were written.
    """
    for place in s.folders:
        mine = files.LICENCE_FILES if place is s.folders[0] else ()
        names = [f for f in files.SIDE_FILES if place is s.folders[0] or f != "config.json"]
        files.copy_files(place, folder, [*names, *mine])
    for name, blob in s.side.items():
        (folder / name).write_bytes(blob)
    blueprint.write_config(folder, s.config, s.decoder, dtype)
    if to == "orbax":
        cache.write(folder, s.tensors, abstract_weights(s.decoder), s.decoder.family, said)
    else:
        files.write_folder(folder, s.tensors, shard_bytes, said, keep=True)


class Origin(NamedTuple):
    """Where a model came from, for its card."""

    base: card.Base
    adapters: tuple[str, ...]  # folders that were merged into it
    text: str  # of the card of what it was made from


def origin(source: str, adapter: Sequence[str], folders: Sequence[Path]) -> Origin:
    """Where the model of `source` under adapters came from; `folders` are `Source`'s."""
    merged = tuple(adapter) or ((source,) if (_export(source) / adapters.CONFIG).exists() else ())
    cards = (_export(p) / card.FILE for p in merged or (source,))
    own = next((f for f in cards if f.is_file()), None)
    given = soft_prompts.open_adapter(_export(source)).base if merged and not adapter else source
    text = own.read_text(encoding="utf-8", errors="replace") if own else ""
    return Origin(card.Base(given, folders[0] if folders else Path(source)), merged, text)


def _export(place: str) -> Path:
    """A run's export; another folder is itself."""
    return Path(place) / job.EXPORT if (Path(place) / job.CONFIG).exists() else Path(place)
