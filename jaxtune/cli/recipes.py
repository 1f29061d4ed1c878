"""The configs that come along: ls, show, cp."""

import shutil
from pathlib import Path
from typing import Annotated

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


@recipes.command("ls")
def recipes_ls() -> None:
    """List the recipes, with the first line of each."""
    files = sorted(recipe_folder().glob("*.yaml"))
    log.table([(f.stem, f.read_text().splitlines()[0].lstrip("# ")) for f in files])


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
