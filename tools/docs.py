"""Pages of docs/ that are made from the code when `mkdocs build` runs: every verb, and every key of a config.

mkdocs.yml names this file as a hook, and as an extension of griffe, which reads docstrings. What the reference of the
Python API lists is in docs/reference/api.md.
"""

import json
import re
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import griffe
import typer
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from jaxtune import cli, config

app = cli.common.app  # with its verbs, which importing the package brought


def on_files(files: Files, config: Any) -> Files:
    """The hook: two pages more."""
    files.append(File.generated(config, "reference/cli.md", content=verbs()))
    files.append(File.generated(config, "reference/config.md", content=keys()))
    return files


class Doctests(griffe.Extension):
    """Examples in docstrings stand in fences, as Markdown wants them; here `>>>` begins them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """A docstring with its examples in fences, without what only the test of them needs.

    >>> fenced("Says.\\n\\n>>> f(1)  # doctest: +SKIP\\n2").splitlines()[2:]
    ['```python', '>>> f(1)', '2', '```']
    """
    out: list[str] = []
    inside = False
    for line in [*text.splitlines(), ""]:
        if not inside and line.lstrip().startswith(">>> "):
            out, inside = [*out, "```python"], True
        elif inside and not line.strip():
            out, inside = [*out, "```"], False
        out.append(re.sub(r" +# doctest: .*", "", line).lstrip() if inside else line)
    return "\n".join(out).rstrip()


# --- verbs ------------------------------------------------------------------------------------------------------------


def verbs() -> str:
    """Every verb with what its --help says, as Markdown."""
    out = ["# Verbs", "", "As `jaxtune VERB --help` says. Exit codes: 0 done, 2 something that the user can put right "
           "(one line says what), 75 stopped and saved, run it again.", ""]  # fmt: skip
    for name, command, context in _commands(typer.main.get_command(app), ["jaxtune"]):
        out += [f"## {name}", "", "```text", command.get_help(context).rstrip(), "```", ""]
    return "\n".join(out)


def _commands(command: Any, path: list[str], parent: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """A group's commands and theirs."""
    context = command.make_context(path[-1], [], parent, resilient_parsing=True, terminal_width=84)
    below = getattr(command, "commands", {})
    for name, inner in below.items():
        yield from _commands(inner, [*path, name], context)
    if not below:
        yield " ".join(path[1:]), command, context


# --- keys -------------------------------------------------------------------------------------------------------------


def keys() -> str:
    """Every key of a config with its default and what it means, as Markdown."""
    out = ["# Keys of a config", "", "A config is YAML; every key can also be given as `key=value` on the command "
           "line. `jaxtune config-schema` prints the same as a JSON schema, for editors.", ""]  # fmt: skip
    out += _section("", config.Config, set())
    return "\n".join(out)


def _section(path: str, section: type[BaseModel], told: set[type]) -> list[str]:
    """A section's table, and those of the sections in it that were not told of before."""
    out, below = [], []
    title = path or "The whole"
    out += [
        f"## {title}",
        "",
        _prose((section.__doc__ or "").partition(">>>")[0]),
        "",
        "| key | type | default | what it means |",
        "|---|---|---|---|",
    ]
    for name, field in section.model_fields.items():
        inside = [a for a in _flat(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        dotted = f"{path}.{name}" if path else name
        for a in inside:
            own = a.model_fields.get("method")
            suffix = f": {get_args(own.annotation)[0]}" if own is not None else ""
            many = "[]" if "list" in str(field.annotation) else ""
            if a not in told:
                told.add(a)
                below.append((f"{dotted}{many}{suffix}", a))
        kind = "a section" if inside and "list" not in str(field.annotation) else _kind(field.annotation)
        shown = "" if inside and field.default else _default(field)
        out.append(
            f"| `{dotted.rpartition('.')[2]}` | {kind} | {shown} | {_prose(field.description or _first(inside))} |"
        )
    out.append("")
    for name, a in below:
        out += _section(name, a, told)
    return out


def _first(sections: list[type[BaseModel]]) -> str:
    """What a section is, where its key says no more."""
    return (sections[0].__doc__ or "") if len(sections) == 1 else "One of those below."


def _prose(text: str) -> str:
    """A docstring on one line, fit for a table; what is a name in quotation marks stays as it is."""
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    return "" if isinstance(value, BaseModel) else f"`{json.dumps(value, ensure_ascii=False)}`"


def _flat(annotation: Any) -> list[Any]:
    """All types that stand in an annotation."""
    inside = get_args(annotation)
    if get_origin(annotation) is Literal or not inside:
        return [annotation]
    return [t for a in inside for t in _flat(a)]


def _kind(annotation: Any) -> str:
    """An annotation in words.

    >>> _kind(int | None), _kind(list[str]), _kind(Literal["a", "b"])
    ('whole number or null', 'list of text', '`a`, `b`')
    """
    words = {int: "whole number", float: "number", str: "text", bool: "true, false", types.NoneType: "null"}
    origin, inside = get_origin(annotation), get_args(annotation)
    if annotation in words:
        return words[annotation]
    if origin is Literal:
        return ", ".join(f"`{x}`" for x in inside)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(a) for a in inside)
    if origin is list:
        return f"list of {_kind(inside[0])}"
    if origin is dict:
        return f"{_kind(inside[0])} → {_kind(inside[1])}"
    if origin is not None and inside:  # Annotated
        return _kind(inside[0])
    return "a section" if isinstance(annotation, type) and issubclass(annotation, BaseModel) else str(annotation)
