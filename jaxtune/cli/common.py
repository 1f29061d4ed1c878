"""What the verbs share: the app, arguments of one meaning, the config that arguments name."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxtune import config, log
from jaxtune.errors import UserError

app = typer.Typer(
    name="jaxtune",
    help="Fine-tune large language models with JAX. `jaxtune VERB --help` tells more of a verb.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Pairs = Annotated[
    list[str] | None, typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="A YAML file, and values over it.")
]
Target = Annotated[str, typer.Argument(help="A run folder, an export, or a model folder in Hugging Face format.")]
Adapter = Annotated[str | None, typer.Option(help="A PEFT adapter folder to put on the model.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="A PEFT adapter folder to put on the model; several, to compare them."),
]
Dtype = Annotated[str, typer.Option(help="Compute in float32 or bfloat16.")]

Kv = Annotated[
    str,
    typer.Option(help="How keys and values of what was read are held: same, or int8, a quarter of float32."),
]


def read_config(arguments: list[str] | None, devices: Callable[[], int] = lambda: 1) -> config.Config:
    """The config that the arguments of a verb name: a file, if the first is none of key=value, and values over it.

    What a config of LLaMA-Factory is translated into is said, for so many devices.
    """
    file, given = file_and_values(arguments)
    if (t := config.translation(file, given, devices=devices)) is None:
        return config.load(file, given)
    log.say(f"{file or 'the given keys'}: of LLaMA-Factory, translated:\n\n{config.dump_tree(t.tree)}")
    for note in t.notes:
        log.say(note)
    return config.validate(t.tree, str(file or "config"))


def file_and_values(arguments: list[str] | None) -> tuple[Path | None, dict[str, Any]]:
    """The arguments of a verb that takes a config."""
    rest = list(arguments or [])
    file = Path(rest.pop(0)) if rest and "=" not in rest[0] else None
    if file is None and not rest:
        raise UserError("neither a config nor a key=value was given; `jaxtune recipes ls` lists configs")
    return file, config.parse_overrides(rest)


def one_of(option: str, value: str, allowed: list[str]) -> None:
    """Raises: UserError: the value of an option is not among those allowed."""
    if value not in allowed:
        raise UserError(f"{option} {value!r} is not known; allowed: {', '.join(allowed)}")


def dtype_of(value: str) -> str:
    """The value of --dtype, checked."""
    one_of("--dtype", value, ["float32", "bfloat16"])
    return value


def table(heads: list[str], rows: list[list[str]], none: str) -> None:
    """Print rows in columns under their heads, or that there are none; control characters do not reach the terminal.

    >>> table(["id", "size"], [["a\x1b[1m", "3"]], "nothing")
    id     size
    a?[1m  3
    """
    if not rows:
        return log.say(none)
    plain = [heads, *([shown(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in plain) for i in range(len(heads))]
    for row in plain:
        log.say("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip())


def shown(text: str) -> str:
    """What somebody else wrote, fit for a terminal: a control character becomes a question mark."""
    return "".join(c if c.isprintable() else "?" for c in text)
