"""The page's files: what is served, that its two languages say the same, that its colours can be read."""

import json
import re
from pathlib import Path

import openai
import pytest

import jaxtune

FOLDER = Path(jaxtune.__file__).parent / "serve" / "page"
SCRIPTS = sorted(FOLDER.glob("*.js"))
TEXTS = {code: json.loads((FOLDER / f"texts.{code}.json").read_text(encoding="utf-8")) for code in ("en", "zh")}


def test_languages_have_the_same_texts_with_the_same_places():
    en, zh = TEXTS["en"], TEXTS["zh"]
    assert en.keys() == zh.keys()
    for key in en:
        assert set(re.findall(r"\{\w+\}", en[key])) == set(re.findall(r"\{\w+\}", zh[key])), key
        assert en[key].strip(), key
        assert zh[key].strip(), key


def test_every_text_that_is_asked_for_is_there():
    asked = {key for f in SCRIPTS for key in re.findall(r'\bt\("([^"]+)"', f.read_text(encoding="utf-8"))}
    assert len(asked) > 100
    assert asked <= TEXTS["en"].keys()


def test_nothing_reads_html_or_other_hosts():
    for file in SCRIPTS:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function", text), file
        assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}, file
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\sstyle=|\son\w+=|<style|<script(?![^>]*src)|//", html.replace("<!doctype html>", ""))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def themes() -> list[dict[str, str]]:
    css = (FOLDER / "base.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root(?:\[data-theme=\"dark\"\]|:not\(\[data-theme\]\))? \{(.*?)\}", css, re.S)
    return [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", b)) for b in blocks]


def test_colours_can_be_told_apart():
    light, dark, chosen = themes()
    assert dark == chosen  # the one that the system asks for is the one that the switch gives
    for theme in (light, dark):
        for ground in ("paper", "panel", "sunk"):
            for ink in ("ink", "soft", "accent", "bad", "good"):
                assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground)
            for line in ("edge", "tone-1", "tone-2", "tone-3", "tone-4", "tone-5"):
                assert contrast(theme[line], theme[ground]) >= 3, (line, ground)
        assert contrast(theme["ink"], theme["tint"]) >= 4.5
        assert contrast(theme["bad"], theme["bad-tint"]) >= 4.5


@pytest.mark.parametrize("name", ["index.html", "base.css", "main.js", "texts.zh.json", "mark.svg"])
def test_files_are_served(client: openai.OpenAI, url: str, name: str):
    answer = client._client.get(f"{url}/" if name == "index.html" else f"{url}/page/{name}")
    assert answer.status_code == 200
    assert answer.content == (FOLDER / name).read_bytes()
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("name", ["../settings.py", "%2e%2e/settings.py", "nothing.js", "..%5csettings.py", ""])
def test_nothing_else_is_served(client: openai.OpenAI, url: str, name: str):
    answer = client._client.get(f"{url}/page/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"
