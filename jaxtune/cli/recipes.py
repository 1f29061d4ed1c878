"""The configs that come along: ls, show, cp."""

import shutil
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from jaxtune import log
from jaxtune.cli.common import app
from jaxtune.errors import UserError, nearest

recipes = typer.Typer(help="The configs that come along.", no_args_is_help=True)
app.add_typer(recipes, name="recipes")


def recipe_folder() -> Path:
    """Where the configs are: in the installed package, or beside it in a checkout."""
    installed = Path(__file__).parents[1] / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"


def _recipe(name: str) -> Path:
    known = {p.stem: p for p in recipe_folder().glob("*.yaml")}
    if name.removesuffix(".yaml") not in known:
        raise UserError(f"recipe {name!r} does not exist{nearest(name, list(known))}")
    return known[name.removesuffix(".yaml")]


GROUPS = (
    "start here",
    "chat",
    "tasks",
    "pre-training",
    "after training",
    "search",
)  # in the order that they are shown in


class Recipe(NamedTuple):
    """What a recipe's first comment says: `# For: group; method; hardware`, and its first line."""

    name: str
    group: str
    method: str
    hardware: str
    title: str


def read_recipe(file: Path) -> Recipe:
    """The head of a recipe."""
    lines = [line.removeprefix("#").strip() for line in file.read_text().splitlines() if line.startswith("#")]
    purpose = next((line for line in lines if line.startswith("For: ")), "For: others; ; ")
    group, method, hardware = (word.strip() for word in purpose.removeprefix("For:").split(";"))
    return Recipe(file.stem, group, method, hardware, lines[0])


@recipes.command("ls")
def recipes_ls(
    words: Annotated[list[str] | None, typer.Argument(help="Only those with all of these words: qlora v5e-8.")] = None,
) -> None:
    """List the recipes by what they are for, with method, hardware and the first line of each."""
    found = [read_recipe(f) for f in sorted(recipe_folder().glob("*.yaml"))]
    found = [r for r in found if all(w.lower() in " ".join(r).lower() for w in words or ())]
    if not found:
        raise UserError(f"no recipe has all of the words {', '.join(words or ())}; `jaxtune recipes ls` lists all")
    widths = [max(len(r[i]) for r in found) for i in (0, 2, 3)]
    for group in (*GROUPS, *sorted({r.group for r in found} - {*GROUPS})):
        for i, r in enumerate(r for r in found if r.group == group):
            if i == 0:
                log.say(f"{group}:")
            cells = (c.ljust(w) for c, w in zip((r.name, r.method, r.hardware), widths, strict=True))
            log.say(f"  {'  '.join(cells)}  {r.title}")


@recipes.command("show")
def recipes_show(name: str) -> None:
    """Print a recipe."""
    log.say(_recipe(name).read_text().rstrip())


@recipes.command("cp")
def recipes_cp(name: str, target: Annotated[Path, typer.Argument(help="A folder or a file.")] = Path()) -> None:
    """Copy a recipe, to make it one's own."""
    source = _recipe(name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise UserError(f"{target}: exists already; choose another name")
    shutil.copyfile(source, target)
    log.say(f"copied to {target}")
