"""The pages of docs/: nothing public without an example, no key without its meaning, no error that does not exist."""

import importlib
import inspect
import re

import pytest
import yaml

import jaxtune
from jaxtune import config
from tests.conftest import ROOT
from tools import docs

API = ROOT / "docs" / "reference" / "api.md"
NAMES = re.findall(r"^::: (\S+)", API.read_text(), re.MULTILINE)


def test_the_reference_lists_all_that_jaxtune_exports():
    assert {f"jaxtune.{name}" for name in jaxtune.__all__} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_an_example(name):
    module, _, attribute = name.rpartition(".")
    text = inspect.getdoc(getattr(importlib.import_module(module), attribute)) or ""
    assert ">>> " in text, f"{name} has no example"
    assert not text.startswith(">>>"), f"{name} says nothing before its example"


def test_every_key_is_in_the_page_of_keys_with_its_meaning():
    page = docs.keys()
    for name, method in config.METHODS.items():
        assert f"## tuning: {name}\n" in page
        assert all(f"| `{key}` |" in page for key in method.model_fields)
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    said = [row for row in rows if not row.endswith("|  |") or "| a section |" in row or "| `method` |" in row]
    assert len(said) == len(rows), set(rows) - set(said)


def test_every_verb_is_in_the_page_of_verbs():
    page = docs.verbs()
    for verb in ("train", "plan", "recipes ls", "jobs create", "keys add"):
        assert f"## {verb}\n" in page
    assert "key=value" in page.lower()


def test_errors_of_the_guide_are_errors_of_the_code():
    source = "\n".join(p.read_text() for p in (ROOT / "jaxtune").rglob("*.py"))
    table = (ROOT / "docs" / "guide" / "errors.md").read_text().split("|---|---|---|")[1]
    firsts = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    quoted = [m for first in firsts if "(from JAX)" not in first for m in re.findall(r"`([^`]+)`", first)]
    assert len(quoted) > 6
    for phrase in quoted:
        for part in re.split("…| N ", phrase):
            assert part.strip() in source, f"no error says {part!r}"


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"[\w/]+\.md", yaml.dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    assert pages | {"reference/cli.md", "reference/config.md"} == set(listed)


def test_the_tree_of_the_guide_names_every_module():
    tree = (ROOT / "docs" / "guide" / "tree.md").read_text()
    there = [p for p in (ROOT / "jaxtune").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    missing = [p.name for p in there if not p.name.startswith("_") and not re.search(rf"\b{p.name}\b", tree)]
    assert not missing
