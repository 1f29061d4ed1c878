"""Rows in a file, and the examples that they become."""

import json

from jaxtune.config import Source
from jaxtune.data import formats

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def read(path, **options):
    return formats.read(Source(path=str(path), **options))


def jsonl(tmp_path, *rows):
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def one(tmp_path, row, **options):
    [e] = read(jsonl(tmp_path, row), **options)
    return e
