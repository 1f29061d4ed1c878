"""Each task on real data: trained through the code that users run, scored beside its baseline.

    python -m tools.bench.tasks --model FOLDER --data FOLDER [--only sst2 …] [--out FOLDER]

`--model` is a small LLaMA (stories656K), whose every weight is tuned; `--data` holds a folder for each data set, with
train and validation files. The baseline is what costs no thought: the commonest label, the mean, a copy of the source.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune import cli, config, run


class Entry(NamedTuple):
    """A data set and how it is tuned for."""

    data: str
    objective: str = "sft"
    task: str | None = None
    settings: dict[str, Any] = {}  # noqa: RUF012
    epochs: float = 3
    rate: float = 2e-3
    length: int = 256
    rows: int = 400  # of the validation set are scored
    train: int | None = None  # rows to train on; all where None
    suffix: str = ".jsonl"


_SPAN = {"data.format": "qa", "data.stride": 64}
ENTRIES = {
    "sst2, head": Entry("sst2", "classification", settings={"data.columns": {"label": "label_text"}}),
    "sst2, in words": Entry("sst2", "sft", "classification", {"data.columns": {"label": "label_text"}}, length=160),
    "poem_sentiment, head": Entry(
        "poem_sentiment", "classification", settings={"data.columns": {"label": "label_text"}}
    ),
    "ag_news, head": Entry(
        "ag_news",
        "classification",
        settings={"data.columns": {"label": "label_text", "text": "title", "text_pair": "description"}},
        suffix=".csv",
        epochs=2,
    ),
    "banking77, head": Entry(
        "banking77", "classification", settings={"data.columns": {"label": "category"}}, epochs=6, suffix=".csv"
    ),
    "poem_sentiment, regression": Entry(
        "poem_sentiment", "regression", settings={"data.format": "regression"}, epochs=6
    ),
    "snips, tags": Entry("snips", "token_classification", settings={"data.format": "token_classification"}, epochs=6),
    "xquad_en, spans": Entry("xquad_en", "span_qa", settings=_SPAN, epochs=5, length=384, rows=186),
    "xquad_de, spans": Entry("xquad_de", "span_qa", settings=_SPAN, epochs=3, length=512, train=250, rows=60),
    "xquad_zh, spans": Entry("xquad_zh", "span_qa", settings=_SPAN, epochs=3, length=512, train=250, rows=60),
    "cmrc2018_zh, spans": Entry("cmrc2018_zh", "span_qa", settings=_SPAN, epochs=3, length=512, train=250, rows=60),
    "xquad_en, in words": Entry("xquad_en", "sft", "qa", {"data.format": "qa"}, epochs=3, length=448, rows=60),
    "multi30k en-de": Entry(
        "multi30k_en_de",
        "sft",
        "translation",
        {"data.format": "translation", "data.columns": {"source": "en", "target": "de"}},
        epochs=3,
        length=192,
        rows=100,
    ),
    "tatoeba en-zh": Entry(
        "tatoeba_en_zh",
        "sft",
        "translation",
        {"data.format": "translation", "data.columns": {"source": "en", "target": "zh"}},
        epochs=3,
        length=192,
        rows=100,
    ),
    "dialogsum": Entry(
        "dialogsum",
        "sft",
        "summarisation",
        {"data.format": "summarisation", "data.columns": {"document": "dialogue"}},
        epochs=2,
        length=448,
        rows=50,
        train=1500,
    ),
    "glaive dialogues": Entry(
        "glaive_toolcall_en_demo", "sft", "dialogue", {"data.template": "chatml"}, length=448, rows=10
    ),
    "gsm8k": Entry("gsm8k", "sft", "maths", {"data.format": "maths"}, epochs=1, length=384, rows=60, train=2000),
}


def measure(name: str, e: Entry, model: Path, data: Path, out: Path) -> str:
    """A row of the table: train, score."""
    held = data / e.data / f"validation{e.suffix}"
    folder = out / name.replace(", ", "-").replace(" ", "-")
    given = {
        "model": str(model), "output": str(folder),
        "data.train": [{"path": str((data / e.data / f"train{e.suffix}").absolute()), "max_samples": e.train}],
        "data.validation": str(held), "data.max_length": e.length, "data.packing": True,
        "objective": e.objective, "tuning.method": "full",
        "train.epochs": e.epochs, "train.batch_size": 16, "train.compute_dtype": "float32", "train.remat": "none",
        "train.log_every": 50, "optim.learning_rate": e.rate, "evaluate.every": 10**6, "checkpoint.every": 10**6,
        "data.format": "classification" if "classification" in (e.objective, e.task) else "auto", **e.settings,
    }  # fmt: skip
    began = time.perf_counter()
    run.train(config.load(None, config.nested(given)))
    seconds = time.perf_counter() - began
    asked = ["--task", e.task] if e.task else []
    cli.app(
        ["evaluate", str(folder), str(held), *asked, "--max-samples", str(e.rows), "--batch-size", "16"],
        standalone_mode=False,
    )
    found = json.loads((folder / "scores.json").read_text())
    base = found["baseline"] or {}
    metric = found["metric"]
    shown = {
        k: v for k, v in found["scores"].items() if k == metric or k in ("f1_macro", "exact_match", "chrf", "rouge1")
    }
    scores = ", ".join(f"{k} {v:.3g}" for k, v in shown.items())
    beside = ", ".join(f"{k} {base[k]:.3g}" for k in shown if k in base) or "-"
    return f"| {name} | {found['rows']} | {scores} | {base.get('name', '-')}: {beside} | {seconds:.0f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of names")
    a = parser.parse_args(arguments)
    rows = []
    for name, e in ENTRIES.items():
        if not a.only or any(name.startswith(o) for o in a.only):
            rows.append(measure(name, e, a.model, a.data, a.out))
            print(rows[-1], flush=True)
    print("\n| task | rows | scores | baseline | training, s |\n|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
