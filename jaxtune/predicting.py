"""The rows of a file answered, by one model or by several side by side."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtune import config, head_scores, log, tasks
from jaxtune.data import answered, pipeline
from jaxtune.data import heads as data_heads
from jaxtune.data.examples import Conversation, Document, Example
from jaxtune.data.heads import HeadSettings
from jaxtune.errors import UserError
from jaxtune.generate import Generation, Sampling
from jaxtune.tuned import Tuned


def predict(
    models: Tuned | Mapping[str, Tuned],
    data: config.Data,
    out: Path,
    s: Sampling,
    batch_size: int,
    said: Callable[[int, int], None],
    logprobs: bool = False,
    as_data: bool = False,
) -> int:
    """Answer each row of `data.train`, to JSONL with `prompt`, `prediction`, `finish` and, if any, `reference`.

    With `logprobs` also those of each new token. With more than one sample `predictions`, `finish` and `logprobs` are
    lists, one entry per sample. With several models `predictions`, `finish` and `logprobs` are maps from their names,
    and `prompt` is one too where their chat templates differ.

    Of a model with a head, what it says of each row. Rows that cannot be read are counted, see `data.bad_rows`.

    With `as_data` rows are such that `train` reads, see `data.answered`, one for each sample. Answers to questions that
    were not finished are left out.

    Returns: the number of rows written. The file appears when it is complete.
    """
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name a file for the answers")
    if as_data and logprobs:
        raise UserError("--as-data writes rows to train on, which hold no log-probabilities; leave --logprobs out")
    remarks: list[str] = []
    examples = pipeline.examples(data, remarks, answers=False)
    for remark in remarks:
        log.say(remark)
    if isinstance(models, Tuned) and (settings := models.head_settings(data)) is not None:
        if as_data:
            raise UserError("--as-data writes answers in words, and the model has a head")
        return _judged(models, examples, settings, out, batch_size)
    if as_data and not isinstance(models, Tuned):
        raise UserError("--as-data writes the answers of one model; give one adapter at most")
    unfinished = 0
    examples = [tasks.asked(e, tasks.options_of(data)) for e in examples]
    named = {"": models} if isinstance(models, Tuned) else models
    asked = {name: [asked_of(m, e) for e in examples] for name, m in named.items()}
    first, *others = asked.values()
    alike = all(pairs == first for pairs in others)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("w", encoding="utf-8") as f:
            for i in range(0, len(examples), batch_size):
                rows = range(i, min(i + batch_size, len(examples)))
                made = {n: _generate(m, [asked[n][j][0] for j in rows], s) for n, m in named.items()}
                for j in rows if as_data else ():
                    whole = [g for g in made[""][j - i] if g.finish == "stop" or isinstance(examples[j], Document)]
                    unfinished += len(made[""][j - i]) - len(whole)
                    for g in whole:
                        f.write(json.dumps(answered.row(examples[j], g.text), ensure_ascii=False) + "\n")
                for j in rows if not as_data else ():
                    prompt = first[j][0] if alike else {n: pairs[j][0] for n, pairs in asked.items()}
                    answers = {n: _row(made[n][j - i], logprobs) for n in named}
                    row = {"prompt": prompt, **(answers[""] if isinstance(models, Tuned) else _beside(answers))}
                    row |= {} if first[j][1] is None else {"reference": first[j][1]}
                    f.write(json.dumps(row, ensure_ascii=False) + "\n")
                said(rows.stop, len(examples))
        if as_data and unfinished == len(examples) * s.samples:
            raise UserError(f"{data.sources[0].path}: no answer was finished; raise --max-new-tokens")
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    if unfinished:
        log.say(f"{unfinished} answers were not finished within their length and are left out")
    return len(examples) * (s.samples if as_data else 1) - unfinished


def _judged(tuned: Tuned, examples: Sequence[Example], s: HeadSettings, out: Path, batch_size: int) -> int:
    """What a head says of every row."""
    records = data_heads.records(examples, s.objective)
    rows = head_scores.predictions(s, tuned.tokenizer, records, iter(tuned.judge(records, s, batch_size)))
    out.parent.mkdir(parents=True, exist_ok=True)
    log.write_whole(out, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return len(rows)


def asked_of(tuned: Tuned, e: Example) -> tuple[str, str | None]:
    """A row's prompt, as the model was trained to see it, and the answer that the row gives."""
    if not isinstance(e, Conversation | Document):
        raise UserError(f"{e.origin}: a row of this kind cannot be answered; give a conversation or a prompt")
    if isinstance(e, Document):
        return (tuned.tokenizer.bos_token or "") + e.text, None
    if tuned.template is not None:
        return tuned.asked(e)
    if [m.role for m in e.messages] in (["user"], ["user", "assistant"]):
        return tuned.prompt(e.messages[:1]), e.messages[1].content if len(e.messages) > 1 else None
    raise UserError(f"{e.origin}: a conversation needs a chat template, and the model has none")


def _generate(tuned: Tuned, prompts: Sequence[str], s: Sampling) -> list[list[Generation]]:
    """The samples of each prompt."""
    with jax.set_mesh(tuned.mesh):
        made = tuned.generator.generate(prompts, s)
    return [made[i : i + s.samples] for i in range(0, len(made), s.samples)]


def _beside(answers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The answers of several models to one prompt, column by column."""
    columns = next(iter(answers.values()))
    return {("predictions" if k == "prediction" else k): {n: a[k] for n, a in answers.items()} for k in columns}


def _row(made: Sequence[Generation], logprobs: bool) -> dict[str, Any]:
    """What `predict` writes of the texts of one prompt."""
    columns: dict[str, list] = {"prediction": [g.text for g in made], "finish": [g.finish for g in made]}
    if logprobs:
        columns["logprobs"] = [g.logprobs for g in made]
    if len(made) == 1:
        return {k: v[0] for k, v in columns.items()}
    return {"predictions" if k == "prediction" else k: v for k, v in columns.items()}
