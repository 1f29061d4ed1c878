"""Reading a config: one YAML file and `key=value` overrides. Relative paths in a file start at that file."""

import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from jaxtune.config import llamafactory
from jaxtune.config.llamafactory import Translation
from jaxtune.config.schema import DEMO, Config, Data, Group, Mesh, Source
from jaxtune.config.sweep import Range, Sweep
from jaxtune.config.tuning import METHODS, Lora
from jaxtune.errors import UserError, nearest


class _Loader(yaml.SafeLoader):
    """YAML with 1e-4 as a number, 10:13 as text, and duplicate keys as errors."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
for _first in "-+0123456789":  # YAML 1.1 reads 10:13 as 10 × 60 + 13
    _sixty = ("tag:yaml.org,2002:str", re.compile(r"^[-+]?\d[\d_]*(?::[0-5]?\d)+(?:\.\d*)?$"))
    _Loader.yaml_implicit_resolvers[_first].insert(0, _sixty)


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict:
    seen = set()
    for key, _ in node.value:
        if key.value in seen:
            raise UserError(f"line {key.start_mark.line + 1}: key {key.value!r} stands twice; keep one")
        seen.add(key.value)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML or JSON file as nested dicts, its paths made to start at the file's folder.

    Raises:
      UserError: the file is missing or is not a mapping.
    """
    try:
        text = file.read_text()
        tree = json.loads(text, object_pairs_hook=_once) if file.suffix == ".json" else _parse(text)
    except FileNotFoundError as e:
        raise UserError(f"{file}: no such config; `jaxtune recipes ls` lists those that come along") from e
    except IsADirectoryError as e:
        raise UserError(f"{file}: is a folder, not a YAML file") from e
    except UserError as e:
        raise UserError(f"{file}: {e}") from e
    except (yaml.YAMLError, UnicodeDecodeError, json.JSONDecodeError) as e:
        kind = "JSON" if file.suffix == ".json" else "YAML"
        raise UserError(f"{file}: not {kind}: {' '.join(str(e).split())}") from e
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{file}: a mapping of keys was expected, this is a {type(tree).__name__}")
    return _with_paths_from(tree, file.parent)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested dicts; paths start at the working directory.

    >>> nested({"train.steps": 20, "optim": {"name": "lion"}})
    {'train': {'steps': 20}, 'optim': {'name': 'lion'}}
    """
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        level = tree
        for parent in parents:
            level = level.setdefault(parent, {})
            if not isinstance(level, dict):
                raise UserError(f"{key}: {parent} has a value of its own already")
        level[last] = str(value) if isinstance(value, Path) else value
    return _with_paths_from(tree, Path())


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["train.steps=20", "optim.learning_rate=1e-4"]` as nested dicts.

    >>> parse_overrides(["train.steps=20", "optim.learning_rate=1e-4"])
    {'train': {'steps': 20}, 'optim': {'learning_rate': 0.0001}}
    """
    values = {}
    for pair in pairs:
        key, eq, value = pair.partition("=")
        if not eq or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise UserError(f"{pair!r}: key=value was expected, such as train.steps=20")
        try:
            values[key] = _parse(value)
        except yaml.YAMLError as e:
            raise UserError(f"{pair!r}: the value is not YAML: {' '.join(str(e).split())}") from e
    return nested(values)


def load(file: Path | None, *layers: Mapping[str, Any], devices: Callable[[], int] = lambda: 1) -> Config:
    """The config of a file under layers of overrides, later ones first. Flat keys of LLaMA-Factory are translated.

    Args:
      file: a YAML or JSON file.
      layers: overrides.
      devices: how many there are, which LLaMA-Factory's batch sizes are multiplied by.

    >>> load(None, {"tuning": {"rank": 4}}, nested({"train.steps": 20})).train.steps
    20

    Raises:
      UserError: an unknown key, or a value that does not fit, in one line.
    """
    t = translation(file, *layers, devices=devices)
    return validate(t.tree if t else _layered(file, layers), str(file) if file else "config")


def translation(
    file: Path | None, *layers: Mapping[str, Any], devices: Callable[[], int] = lambda: 1
) -> Translation | None:
    """LLaMA-Factory's flat keys of a file and overrides as ours, with sections of ours over them; None without any."""
    theirs: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for layer in (read_yaml(file) if file else {}, *layers):
        flat, sections = llamafactory.split(layer)
        theirs, own = {**theirs, **flat}, _merge(own, sections)
    if not llamafactory.recognises(theirs, own):
        return None
    try:
        sizes = Mesh.model_validate(own.get("mesh", {})).sizes.values()
    except ValidationError:  # which is said where the whole is validated
        sizes = {}.values()
    if sizes and -1 not in sizes:
        devices = functools.partial(math.prod, sizes)
    t = llamafactory.translate(theirs, str(file) if file else "config", file.parent if file else Path(), devices)
    return t._replace(tree=_merge(t.tree, own))


def _layered(file: Path | None, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tree = read_yaml(file) if file else {}
    for layer in layers:
        tree = _merge(tree, layer)
    return tree


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys each stand once."""
    for i, (key, _) in enumerate(pairs):
        if key in [k for k, _ in pairs[:i]]:
            raise UserError(f"key {key!r} stands twice; keep one")
    return dict(pairs)


def validate(tree: Mapping[str, Any], place: str) -> Config:
    """A config from nested dicts; one error that lists every fault."""
    try:
        return Config.model_validate(tree)
    except ValidationError as e:
        inner = [".".join(map(str, err["loc"])) for err in e.errors() if "list[Source]" in err["loc"]]
        faults = [err for err in e.errors() if not (inner and err["type"] == "string_type")]
        raise UserError(f"{place}: {'; '.join(_fault(err) for err in faults)}") from e


def dump(config: Config) -> str:
    """A config as YAML, every key with its value; paths are absolute, so it reads the same from anywhere."""
    return dump_tree(config.model_dump())


def dump_tree(tree: Mapping[str, Any]) -> str:
    """Nested dicts as YAML; paths are absolute."""
    return yaml.safe_dump(_with_paths_from(dict(tree), Path.cwd()), sort_keys=False, allow_unicode=True)


def alike(a: str, b: str) -> bool:
    """Whether the keys of a tuning method mean the same to another."""
    return a == b or {a, b} == {"lora", "qlora"}


def _merge(old: Any, new: Any) -> Any:
    """`new` over `old`. Another tuning method starts afresh: the keys of the old one mean nothing to it, but that
    qlora takes those of lora."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    if "method" in new and not alike(old.get("method", "lora"), new["method"]):
        return dict(new)
    return {**old, **{k: _merge(old.get(k), v) for k, v in new.items()}}


def _with_paths_from(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Relative paths joined to `folder`. A model that is no folder there may be a hub id and stays as it is."""

    def joined(value: Any, must: bool = True) -> Any:
        if not isinstance(value, str) or value in (DEMO, "") or "://" in value or Path(value).is_absolute():
            return value
        path = Path(os.path.normpath(folder / Path(value).expanduser()))
        return str(path) if must or path.exists() or value.startswith((".", "~")) or value.count("/") != 1 else value

    tree = dict(tree)
    if isinstance(data := tree.get("data"), dict):
        data = tree["data"] = dict(data)
        registry = data.get("registry")
        if registry is not None:
            data["registry"] = joined(registry)  # sources are names in it
        for key in ("train", "validation") if registry is None else ():
            if isinstance(value := data.get(key), list):
                data[key] = [{**s, "path": joined(s.get("path"))} if isinstance(s, dict) else s for s in value]
            elif key in data:
                data[key] = joined(value)
        if str(data.get("template", "")).endswith((".jinja", ".jinja2", ".j2")):
            data["template"] = joined(data["template"])
    if "model" in tree:
        tree["model"] = joined(tree["model"], must=False)
    if "output" in tree:
        tree["output"] = joined(tree["output"])
    if isinstance(distill := tree.get("distill"), dict):
        places = {k: joined(distill[k], must=k == "columns") for k in ("teacher", "columns") if k in distill}
        tree["distill"] = {**distill, **places}
    if isinstance(tuning := tree.get("tuning"), dict) and "adapter" in tuning:
        tree["tuning"] = {**tuning, "adapter": joined(tuning["adapter"])}
    if isinstance(sweep := tree.get("sweep"), dict) and isinstance(keys := sweep.get("keys"), dict):
        tree["sweep"] = {**sweep, "keys": {k: _tried_from(k, v, folder) for k, v in keys.items()}}
    return tree


def _tried_from(key: Any, given: Any, folder: Path) -> Any:
    """The values that a sweep tries of a key, as that key reads them."""
    if not isinstance(given, list) or not isinstance(key, str):
        return given

    def read(value: Any) -> Any:
        *parents, last = key.split(".")
        tree: dict[str, Any] = {last: value}
        for parent in reversed(parents):
            tree = {parent: tree}
        tree = _with_paths_from(tree, folder)
        for parent in parents:
            tree = tree[parent]
        return tree[last]

    return [read(value) for value in given]


def _fault(error: Mapping[str, Any]) -> str:
    """One fault in plain words, with the nearest valid key where one is unknown."""
    parts = [str(p) for p in error["loc"] if p not in ("float", "str", "list[Source]", "list[str]")]
    loc = [p for before, p in zip(["", *parts], parts, strict=False) if not (before == "tuning" and p in METHODS)]
    if loc[:2] == ["sweep", "keys"]:
        loc = [p for p in loc if p not in ("range", "list")]
    where = ".".join(loc) or "config"
    if error["type"] == "extra_forbidden":
        return f"unknown key {where}{nearest(loc[-1], _keys(loc[:-1], error))}"
    if error["type"] == "union_tag_invalid":
        return f"{where}.method: {error['ctx']['tag']!r} is unknown; allowed: {', '.join(METHODS)}"
    if error["type"] == "union_tag_not_found":
        return f"{where}.method: is missing; allowed: {', '.join(METHODS)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message[0].lower()}{message[1:]}, got {error['input']!r}" if loc else message


def _keys(loc: Sequence[str], error: Mapping[str, Any]) -> list[str]:
    """The keys that are allowed at a place."""
    model: Any = Config
    for part in loc:
        if part == "tuning":
            model = next((METHODS[p] for p in error["loc"] if p in METHODS), Lora)
        elif part.isdigit() or (part == "train" and model is Data):
            model = Group if model is Group else Source
        elif part == "groups":
            model = Group
        elif part == "sweep":
            return list((Range if "keys" in loc else Sweep).model_fields)
        else:
            found = model.model_fields[part].annotation
            model = next((a for a in get_args(found) if hasattr(a, "model_fields")), found)  # of a section or none
    return list(model.model_fields)
