"""README.md and README.zh.md: in step with one another, and with the verbs, recipes and pages that they name."""

import re

import pytest
import typer

from jaxtune import cli
from jaxtune.cli.common import app
from tests.conftest import ROOT

BOTH = [ROOT / "README.md", ROOT / "README.zh.md"]
PAGES = [*BOTH, *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = {p.stem for p in cli.recipe_folder().glob("*.yaml")}


def fences(text):
    return re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)


def prose(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def test_the_languages_have_the_same_headings_commands_tables_and_links():
    english, chinese = (p.read_text() for p in BOTH)
    assert fences(english) == fences(chinese)
    assert len(fences(english)) > 8
    for pattern in (r"^#+(?= )", r"\]\(([^)]+)\)", r"^\|(?=[-|]+$)"):
        found = [re.findall(pattern, prose(t), re.MULTILINE) for t in (english, chinese)]
        other = {"README.md": "README.zh.md"}  # each names the other
        assert [other.get(x, x) for x in found[0]] == [other.get(x, x) for x in found[1]]
    rows = [[line for line in prose(t).splitlines() if line.startswith("|")] for t in (english, chinese)]
    assert [r.count("|") for r in rows[0]] == [r.count("|") for r in rows[1]]
    ticks = [[re.findall("[✓–?]", r) for r in table if "✓" in r] for table in rows]
    assert ticks[0] == ticks[1]
    names = [sorted(re.findall(r"`([^`\n]*[a-z][^`\n]*)`", prose(t))) for t in (english, chinese)]
    assert names[0] == names[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    command = typer.main.get_command(app)
    for line in re.findall(r"(?:^|`|% ?|&& )jaxtune ([a-z][\w-]*.*?)(?:`|#|$)", text, re.MULTILINE):
        verb = line.split()[0]
        assert verb in command.commands, f"{page.name}: no verb is named {verb}"
        known = {o for p in command.commands[verb].params for o in (*p.opts, *p.secondary_opts)}
        for option in re.findall(r"(?<=\s)(--[a-z-]+)", line):
            below = getattr(command.commands[verb], "commands", {})
            inner = {o for c in below.values() for p in c.params for o in p.opts}
            assert option in known | inner | {"--help", "--debug"}, f"{page.name}: {verb} has no {option}"
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        made = {"cli.md", "config.md"}  # by tools/docs.py
        assert (page.parent / target).exists() or target.rpartition("/")[2] in made, f"{page.name}: no {target}"
    for recipe in re.findall(r"`((?:llama|qwen|gemma|mistral|phi|smollm)\d[\w.]*-[\w.-]+)`", text):
        assert recipe in RECIPES, f"{page.name}: no recipe {recipe}"
