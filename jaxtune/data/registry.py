"""LLaMA-Factory's dataset_info.json: names to sources, with columns and tags under our names.

| there | here |
|-|-|
| file_name | path, in the registry's folder |
| hf_hub_url, folder | hf://owner/name/folder |
| cloud_file_name | path: s3://…, gs://… |
| script_url, or nothing but ms_hub_url or om_hub_url | refused |
| formatting alpaca, sharegpt, openai | format alpaca, sharegpt, messages |
| ranking | format preference |
| columns.kto_tag | format kto |
| alpaca with a prompt and no response | format text |
| columns, tags | columns, tags; naming any column makes the unnamed ones none, as there |
| subset, split | the same |
| num_samples | max_samples: the first n rows, where theirs are drawn; and never a row twice (`weight` repeats) |
| images, videos, audios | refused |

Between an Alpaca instruction and its input stands one newline, as there.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune.config import Data, Source
from jaxtune.errors import UserError, nearest

FILE = "dataset_info.json"
_KEYS = (
    "file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "formatting", "ranking",
    "subset", "split", "folder", "num_samples", "columns", "tags",
)  # fmt: skip
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
_TURNS = {"messages": "conversations"}
_SHARED = {"system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected", "kto_tag": "label"}
_MEDIA = ("images", "videos", "audios")
_TAGS = {
    "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
    "observation_tag": "tool", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip


def resolve(data: Data) -> tuple[list[Source], list[Source]]:
    """Sources of training and validation; names in `data.registry`, also several with commas, become what they name.

    What the config says of a source (format, columns, tags, subset, split, weight) holds before the registry; of two
    max_samples the smaller does.

    Raises:
      UserError: the registry cannot be read, or has no such name, or it names what is not read here.
    """
    if data.registry is None:
        return data.sources, data.validation_sources
    entries, folder = load(data.registry)

    def named(sources: list[Source]) -> list[Source]:
        names = [(name.strip(), s) for s in sources for name in s.path.split(",") if name.strip()]
        return [_merged(source(name, entries, folder), s) for name, s in names]

    return named(data.sources), named(data.validation_sources)


def load(registry: str) -> tuple[Mapping[str, Any], Path]:
    """The entries of a registry, and its folder."""
    path = Path(registry)
    path = path / FILE if path.is_dir() else path
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise UserError(f"data.registry: {path}: {e.strerror}; give a {FILE} or its folder") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"data.registry: {path}: not JSON: {e}") from e
    if not isinstance(entries, dict):
        raise UserError(f"data.registry: {path}: an object of names was expected, got {type(entries).__name__}")
    return entries, path.parent


def source(name: str, entries: Mapping[str, Any], folder: Path) -> Source:
    """An entry as a source.

    >>> source("a", {"a": {"file_name": "a.json", "columns": {"prompt": "q", "response": "r"}}}, Path("data")).columns
    {'instruction': 'q', 'input': '', 'output': 'r', 'history': '', 'system': '', 'tools': ''}
    """
    if name not in entries:
        raise UserError(f"data: the registry has no {name!r}{nearest(name, list(entries))}")
    where, entry = f"data.registry: {name!r}", entries[name]
    if not isinstance(entry, dict):
        raise UserError(f"{where}: an object was expected, got {type(entry).__name__}")
    for key in entry:
        if key not in _KEYS:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, list(_KEYS))}")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise UserError(f"{where}: formatting is {formatting!r:.60}; allowed: alpaca, sharegpt, openai")
    columns = _columns(entry, formatting, where)
    tags = _strings(entry.get("tags") or {}, tuple(_TAGS), f"{where}.tags")
    return Source(
        path=_path(entry, folder, where),
        tags={_TAGS[k]: v for k, v in tags.items()} if formatting != "alpaca" else {"separator": "\n"},
        split=str(entry.get("split") or "train"),
        subset=entry.get("subset"),
        max_samples=entry.get("num_samples"),
        **_format(columns, formatting, bool(entry.get("ranking")), where),
    )


def _columns(entry: Mapping[str, Any], formatting: str, where: str) -> dict[str, str]:
    """Columns under the registry's names."""
    allowed = (*_ALPACA, *_TURNS, *_SHARED, *_MEDIA)
    if entry.get("columns") is None:
        if formatting == "alpaca":
            return {"prompt": "instruction", "query": "input", "response": "output"}
        return {"messages": "conversations"}
    columns = _strings(entry["columns"], allowed, f"{where}.columns")
    for medium in _MEDIA:
        if medium in columns:
            raise UserError(f"{where}: its column {columns[medium]!r} holds {medium}, which are not read; only text is")
    return columns


def _format(columns: Mapping[str, str], formatting: str, ranking: bool, where: str) -> dict[str, Any]:
    """Our format, and the columns under our names; a column that is not named is none."""
    own = _ALPACA if formatting == "alpaca" else {"messages": "messages"} if formatting == "openai" else _TURNS
    first = next(iter(own))
    if first not in columns:
        raise UserError(f"{where}: columns names no {first!r}, which formatting {formatting!r} needs")
    kto = "kto_tag" in columns
    if ranking and not {"chosen", "rejected"} <= columns.keys():
        raise UserError(f"{where}: ranking needs the columns 'chosen' and 'rejected'; name both")
    if formatting == "alpaca" and not ranking and not kto and "response" not in columns:
        return {"format": "text", "columns": {"text": columns["prompt"]}}
    plain = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}[formatting]
    answers = {"chosen", "rejected"} if ranking else {"kto_tag"} if kto else set()
    wanted = {k: v for k, v in {**own, **_SHARED}.items() if k not in _ANSWERS or k in answers}
    if ranking:
        wanted.pop("response", None)
    mapped = {ours: columns.get(theirs, "") for theirs, ours in wanted.items()}
    return {"format": "preference" if ranking else "kto" if kto else plain, "columns": mapped}


_ANSWERS = ("chosen", "rejected", "kto_tag")


def _path(entry: Mapping[str, Any], folder: Path, where: str) -> str:
    # in the order of precedence that LLaMA-Factory has
    if isinstance(hub := entry.get("hf_hub_url"), str):
        return "hf://" + "/".join(p for p in (hub, str(entry.get("folder") or "")) if p)
    for key in ("ms_hub_url", "om_hub_url", "script_url"):
        if key in entry:
            raise UserError(
                f"{where}: {key} {entry[key]!r:.80} is not read here; download the data as files and give it a "
                "file_name, or an hf_hub_url"
            )
    if isinstance(cloud := entry.get("cloud_file_name"), str):
        return cloud
    if isinstance(file := entry.get("file_name"), str):
        return file if re.match(r"\w+://", file) else str(folder / file)
    raise UserError(f"{where}: has no file_name and no hf_hub_url")


def _strings(value: Any, allowed: tuple[str, ...], where: str) -> dict[str, str]:
    """Names to names; those that are null are left out."""
    if not isinstance(value, dict) or not all(isinstance(v, str | None) for v in value.values()):
        raise UserError(f"{where} should give names for names, got {value!r:.80}")
    for key in value:
        if key not in allowed:
            raise UserError(f"{where}: unknown name {key!r}{nearest(key, list(allowed))}")
    return {k: v for k, v in value.items() if v}


def _merged(entry: Source, given: Source) -> Source:
    """The entry, but for what the config says itself."""
    said = given.model_dump(include=given.model_fields_set - {"path"})
    said = {k: v for k, v in said.items() if v not in ("auto", {}, None)}
    if entry.max_samples and given.max_samples:
        said["max_samples"] = min(entry.max_samples, given.max_samples)
    return entry.model_copy(update=said)
