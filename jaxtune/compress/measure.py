"""What compressing does to a model besides its loss: a task's scores, and how fast it decodes here."""

import statistics
import time
from typing import Any

import numpy as np

from jaxtune import config, log, scoring, tasks
from jaxtune.data import pipeline
from jaxtune.generate import Generator, Sampling
from jaxtune.tuned import Tuned

_RUNS = 5


def task_scores(model: Tuned, name: str, file: str, most: int) -> dict[str, float]:
    """The scores of a model's answers to the first questions of a file, as `evaluate --task` has them.

    Raises:
      UserError: the task is not known, or the rows are none of it.
    """
    task = tasks.named(name)
    section: dict[str, Any] = {"train": file, "validation": 0.0, "format": task.format or "auto"}
    data = config.load(None, {"data": section}).data
    remarks: list[str] = []
    examples = pipeline.examples(data, remarks)
    asked = scoring.Asked(model.generator, model.template, thinking=data.thinking, system=data.system)
    result = scoring.score(task, examples, tasks.options_of(data), asked, max_samples=most)
    for remark in (*remarks, *result.remarks):
        log.say(remark)
    return {f"{task.name}_{k}": v for k, v in result.scores.values.items()}


def decoding(model: Tuned) -> float:
    """New tokens per second of one text, the prompt's reading included: the median of five, after one to compile.

    Of the weights as jaxtune holds them; another program that reads the same file has other speeds.
    """
    g, context = model.generator, model.generator.context
    n = max(1, min(64, context // 2))
    endless = Generator(g.model, g.weights, g.tokenizer, ())
    prompt = np.random.default_rng(0).integers(0, model.blueprint.decoder.vocab, max(1, min(32, context - n - 1)))
    seconds = []
    for _ in range(_RUNS + 1):
        begun = time.perf_counter()
        made = endless.generate([prompt.tolist()], Sampling(max_new_tokens=n))
        seconds.append((time.perf_counter() - begun) / len(made[0].ids))
    return 1 / statistics.median(seconds[1:])
