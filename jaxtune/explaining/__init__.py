"""Why a model says what it says: what an answer comes from, what tuning changed, which training rows did it.

`explain` gives a report, a tree of plain values that `explain.json` holds and of which `page` makes `explain.html`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune import __version__, config, job, log
from jaxtune.data.examples import Example
from jaxtune.errors import UserError
from jaxtune.explaining import attributions, changes, influence, page, questions, report
from jaxtune.explaining.questions import Question
from jaxtune.explaining.reader import Reader
from jaxtune.tuned import Tuned, open_model

PARTS = ("attributions", "inside", "changes")
JSON, HTML = "explain.json", "explain.html"
Tree = dict[str, Any]


class Wish(NamedTuple):
    """What is asked."""

    target: str | None = None  # a label's name, or words that go on; None is what the model itself says
    answer: bool = False  # the answer that a row gives
    value: str = "logprob"
    baseline: str = "pad"
    parts: Sequence[str] = PARTS
    base: str | None = None  # the model that it was tuned from, where the run does not say
    influence: int = 0  # how many of the most helpful and of the most harmful training rows are named
    influence_rows: int = 1000  # that are looked at
    max_tokens: int = 256  # of a text; longer ones are refused
    rows: int = 8  # that are read together


def explain(
    name: str, inputs: Sequence[str | Example], wish: Wish, adapter: str | None = None, dtype: str = "float32"
) -> Tree:
    """A report on what a model says to texts or rows; the keys of `Wish` say what is in it.

    Raises:
      UserError: something does not fit; the message says what, where, and what to do.
    """
    if not inputs:
        raise UserError("nothing to explain was given; give a text with --input, or rows with --file")
    for part in wish.parts:
        if part not in PARTS:
            raise UserError(f"--parts {part!r} is not known; allowed: {', '.join(PARTS)}")
    if wish.baseline not in attributions.BASELINES:
        raise UserError(f"--baseline {wish.baseline!r} is not known; allowed: {', '.join(attributions.BASELINES)}")
    if wish.influence:
        influence.trained(Path(name))
    tuned = open_model(name, adapter, dtype)
    questions.check(tuned)
    reader = Reader(tuned, wish.value, wish.rows)
    head = tuned.blueprint.decoder.task
    settings = {"value": wish.value, "baseline": _baseline(tuned, wish.baseline), "dtype": dtype}
    out: Tree = {
        "made_by": f"jaxtune {__version__}", "model": name, "adapter": adapter, "base": None,
        "head": head.kind if head else "language model", "settings": settings, "inputs": [], "remarks": [],
    }  # fmt: skip
    file = Path(name) / job.CONFIG
    prompt = config.load(file).data.prompt if head and file.exists() else None
    asked = [_question(reader, e, i, wish, prompt) for i, e in enumerate(inputs)]
    for i, q in enumerate(asked):
        log.say(f"{q.text.name}: {len(q.text.ids)} tokens, answer {q.says!r} ({i + 1} of {len(asked)})")
        out["inputs"].append(report.on_text(reader, q, wish.baseline, wish.parts, out["remarks"]))
    if "changes" in wish.parts and (base := wish.base or changes.base_of(name, adapter)) is not None:
        log.say(f"what tuning changed in {base}")
        out["base"] = base
        out["changes"] = report.on_changes(reader, changes.open_base(base, tuned), asked, out["remarks"])
    if wish.influence:
        found = influence.tracin(Path(name), reader, asked, wish.influence_rows, log.say)
        out["influence"] = report.on_influence(tuned, found, wish.influence, out["remarks"])
    return out


def write(found: Tree, folder: Path) -> list[Path]:
    """Write a report as JSON and as a page; each file appears when it is whole."""
    if folder.is_file():
        raise UserError(f"{folder}: is a file; give a folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    texts = {JSON: json.dumps(found, ensure_ascii=False) + "\n", HTML: page.html(found)}
    for name, text in texts.items():
        log.write_whole(folder / name, text.encode("utf-8", "replace").decode())
    return [folder / name for name in texts]


def _baseline(tuned: Tuned, kind: str) -> str:
    if kind != "pad":
        return kind
    words = tuned.tokenizer
    return f"the embedding of {words.convert_ids_to_tokens(attributions.pad_token(words))}"


def _question(reader: Reader, given: str | Example, i: int, wish: Wish, prompt: str | None) -> Question:
    tuned = reader.tuned
    example = questions.example_of(tuned, given, f"input {i + 1}") if isinstance(given, str) else given
    text = questions.text_of(tuned, example, wish.max_tokens, prompt)
    if wish.answer and text.answer is None:
        raise UserError(
            f"{text.name}: the row gives no answer to explain; leave --answer out, or name one with --target"
        )
    if (answer := text.answer if wish.answer else wish.target) is not None:
        return questions.answered(tuned, text, answer)
    return questions.choice(tuned, text, int(reader.outputs(questions.choice(tuned, text, 0)).argmax()))
