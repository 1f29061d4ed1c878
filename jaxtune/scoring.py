"""A model's answers to a task's questions, and their scores: for `evaluate --task`, and while training."""

import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune import likelihood, log, tasks
from jaxtune.config import Data, Evaluate
from jaxtune.data import encode
from jaxtune.data.examples import Conversation, Example
from jaxtune.generate import Generator, Sampling
from jaxtune.metrics import choice, classification
from jaxtune.metrics.base import Scores
from jaxtune.tasks import Options, Task
from jaxtune.tasks.classification import names as label_names

SCORES, PREDICTIONS, CONFUSION = "scores.json", "predictions.jsonl", "confusion.png"


class Asked(NamedTuple):
    """How a model is asked: what answers, by which template, how many at a time, how long an answer may be."""

    generator: Generator
    template: str | None
    batch_size: int = 8
    max_new_tokens: int | None = None  # the task's own where None
    thinking: str = "auto"
    system: str | None = None


class Result(NamedTuple):
    """The scores of a task, of its baseline, and a row for each question."""

    scores: Scores
    baseline: tuple[str, Scores] | None
    rows: list[dict[str, Any]]
    remarks: list[str]


def score(
    task: Task,
    examples: Sequence[Example],
    options: Options,
    asked: Asked,
    said: Callable[[int, int], None] = lambda n, of: None,
    max_samples: int | None = None,
) -> Result:
    """Ask the first `max_samples` examples, greedily, and score the answers. `said` is told how many are answered.

    Labels are chosen among those of the config, else among those of all examples; see `tasks.classification`.

    Raises:
      UserError: an example cannot be asked by this task.
    """
    questions = tasks.questions(task, examples[:max_samples], options)
    references = [q.reference for q in questions]
    prompts = [_prompt(q.conversation, asked) for q in questions]
    remarks: list[str] = []

    def told(n: int) -> None:
        said(n, len(questions))

    predictions: list[Any]  # as they are shown
    scored: list[Any] | None = None  # and as they are scored, where that is something else
    extra: list[dict[str, Any]] = [{} for _ in questions]
    if task.decides == "labels" and all(isinstance(r, str) for r in references):
        labels = options.labels or label_names([q.reference for q in tasks.questions(task, examples, options)])
        options = options._replace(labels=tuple(labels))
        found, cut = likelihood.choose(asked.generator, prompts, [labels] * len(prompts), True, asked.batch_size, told)
        predictions = [c[choice.best(c)].text for c in found]
        extra = [{"logprobs": {c.text: round(c.logprob, 5) for c in cs}} for cs in found]
    elif task.decides == "choices":
        choices = [q.row["choices"] for q in questions]
        found, cut = likelihood.choose(asked.generator, prompts, choices, False, asked.batch_size, told)
        scored, predictions = list(found), [choice.best(cs) for cs in found]
        extra = [{"logprobs": [round(c.logprob, 5) for c in cs]} for cs in found]
    else:
        length = asked.max_new_tokens or task.max_new_tokens
        predictions, cut = _generate(asked.generator, prompts, length, asked.batch_size, told)
    if cut:
        remarks.append(
            f"{cut} of {len(prompts)} prompts are too long for the model's context of {asked.generator.context} tokens "
            "beside their answers: their middle was left out"
        )
    scores = task.score(predictions if scored is None else scored, references, options)
    rows = [
        {
            "prompt": prompts[i],
            "prediction": predictions[i],
            "reference": q.reference,
            "origin": q.origin,
            **extra[i],
            "scores": {name: round(values[i], 6) for name, values in scores.rows.items()},
        }
        for i, q in enumerate(questions)
    ]
    known = task.baseline is not None and all(q.row for q in questions)
    baseline = task.baseline([q.row for q in questions], references, options) if known and task.baseline else None
    return Result(scores, baseline, rows, remarks)


def in_loop(evaluate: Evaluate, data: Data, examples: Sequence[Example], asked: Asked) -> dict[str, float]:
    """The scores of `evaluate.task` on a validation set, at most `evaluate.max_samples` examples of it, by name."""
    task = tasks.named(evaluate.task or "")
    asked = asked._replace(max_new_tokens=evaluate.max_new_tokens, thinking=data.thinking, system=data.system)
    result = score(task, examples, tasks.options_of(data), asked, max_samples=evaluate.max_samples)
    for remark in result.remarks:
        log.warn(f"evaluate.task: {remark}")
    return dict(result.scores.values)


def _prompt(conversation: Conversation, asked: Asked) -> str:
    """What stands before an answer, as the model was trained to see it; without a template the bare words."""
    words = asked.generator.tokenizer
    if asked.template is None:
        return (words.bos_token or "") + "".join(m.content for m in conversation.messages)
    return encode.prompt_text(conversation, words, asked.template, asked.thinking, asked.system)[0]


def _generate(
    g: Generator, prompts: Sequence[str], max_new_tokens: int, batch_size: int, said: Callable[[int], None]
) -> tuple[list[str], int]:
    """Greedy answers, and how many prompts lost their middle. Alike lengths are answered together."""
    room = g.context - min(max_new_tokens, g.context // 2)
    ids = [g.encode(p) for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    found: dict[int, str] = {}
    for first in range(0, len(order), batch_size):
        part = order[first : first + batch_size]
        made = g.generate([likelihood.fitted(ids[i], room) for i in part], Sampling(max_new_tokens=max_new_tokens))
        found |= {i: x.text for i, x in zip(part, made, strict=True)}
        said(len(found))
    return [found[i] for i in range(len(ids))], sum(len(x) > room for x in ids)


def table(task: str, metric: str, result: Result) -> list[tuple[str, str]]:
    """Names and values to show, the baseline's beside."""
    name, base = result.baseline or ("", Scores({}))
    rows = [(f"{task}, {len(result.rows)} rows", f"(baseline: {name})" if name else "")]
    for k, v in result.scores.values.items():
        beside = f"   ({base.values[k]:.4f})" if k in base.values else ""
        rows.append((k + (" *" if k == metric else ""), f"{v:.4f}{beside}"))
    signatures = result.scores.details.get("signatures", {})
    return [*rows, *[(f"signature of {k}", v) for k, v in signatures.items()]]


def write(folder: Path, task: str, metric: str, result: Result, about: Mapping[str, Any]) -> list[Path]:
    """Write scores.json, predictions.jsonl and, of labels, confusion.png; what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    packages = ("sacrebleu", "rouge-score", "scikit-learn", "jax", "transformers")
    versions = {p: importlib.metadata.version(p) for p in packages}
    base = {"name": result.baseline[0], **result.baseline[1].values} if result.baseline else None
    whole = {
        "task": task,
        "metric": metric,
        "rows": len(result.rows),
        **about,
        "scores": dict(result.scores.values),
        "baseline": base,
        "details": dict(result.scores.details),
        "remarks": result.remarks,
        "versions": versions,
    }
    log.write_whole(folder / PREDICTIONS, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in result.rows))
    log.write_whole(folder / SCORES, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    written = [folder / SCORES, folder / PREDICTIONS]
    if "confusion" in result.scores.details:
        classification.draw(result.scores, folder / CONFUSION)
        written.append(folder / CONFUSION)
    return written
