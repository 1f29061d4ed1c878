"""A tiny classifier whose label is decided by one word, with one row whose label is wrong."""

import random
from pathlib import Path

import pytest

from jaxtune import explaining, run, tuned
from jaxtune.explaining.reader import Reader
from tests.tiny import make_config, write_jsonl

WRONG = 17  # the row, from 0


def rows() -> list[dict]:
    rng = random.Random(0)
    words = ["the fox", "eats", "berries", "1 + 2", "= 3"]
    out = []
    for i in range(48):
        word = "moon" if i % 2 else "sun"
        rest = rng.sample(words, 3)
        rest.insert(rng.randrange(4), word)
        out.append({"text": " ".join(rest), "label": "night" if i % 2 else "day"})
    assert "moon" in out[WRONG]["text"]
    out[WRONG]["label"] = "day"
    return out


@pytest.fixture(scope="session")
def classifier(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    data = write_jsonl(folder / "rows.jsonl", rows())
    return run.train(
        make_config(
            tiny, data, folder / "run", objective="classification", tuning__method="full",
            data__format="classification",
            train__steps=30, train__batch_size=16, checkpoint__every=10, checkpoint__keep=3, optim__learning_rate=3e-3,
            optim__warmup=0.0,
        )
    )  # fmt: skip


@pytest.fixture(scope="session")
def reader(classifier) -> Reader:
    return Reader(tuned.open_model(str(classifier)), rows=8)


@pytest.fixture(scope="session")
def words(tiny) -> Reader:
    """A language model."""
    return Reader(tuned.open_model(str(tiny)), rows=8)


@pytest.fixture(scope="session")
def report(classifier) -> dict:
    texts = ["the fox eats moon berries", "sun <script>"]
    return explaining.explain(str(classifier), texts, explaining.Wish(influence=3, rows=8))
