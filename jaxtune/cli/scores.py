"""What `evaluate` does with a task, of ours or of lm_eval's."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtune import __version__, config, log
from jaxtune.data.heads import READS as CLASSES
from jaxtune.errors import UserError

if TYPE_CHECKING:
    from jaxtune.config import Config, Data
    from jaxtune.tuned import Tuned

OWN = (  # keys that a run's rows are read with
    "prompt", "labels", "system", "thinking", "train_on", "train_on_space", "max_length", "truncate", "stride",
    "packing",
)  # fmt: skip


class Asking(NamedTuple):
    """What the command line says of a task."""

    task: str
    data: str
    keys: list[str]
    batch_size: int
    max_samples: int | None
    max_new_tokens: int | None
    language: str | None
    kv: str = "same"


def data_and_keys(arguments: Sequence[str], given: str | None, none_needed: bool) -> tuple[str, list[str]]:
    """The data, which is the first argument or an option, and the key=value pairs after it."""
    rest = list(arguments)
    if none_needed and (rest or given):
        raise UserError("--lm-eval: its tasks bring their own data; give neither data nor keys")
    if given is None and rest:
        given = rest.pop(0)
    if given is None and not none_needed:
        raise UserError("no data was given; name a file, such as jaxtune evaluate runs/run data.jsonl")
    return given or "", rest


def folder_of(target: str, out: Path | None) -> Path | None:
    """Where scores go: a folder that was given, or the run folder; nowhere for other models."""
    from jaxtune import job

    return out if out is not None else Path(target) if (Path(target) / job.CONFIG).exists() else None


def by_task(target: str, adapter: str | None, dtype: str, a: Asking, folder: Path | None) -> None:
    """Ask a model a task's questions; print the scores, and write them where there is a folder for them."""
    import jax

    from jaxtune import job, scoring, tasks, tuned
    from jaxtune.data import pipeline

    task = tasks.named(a.task)
    trained = trained_as(target)
    path = str(job.DEMO_FOLDER / "validation.jsonl") if a.data == config.DEMO else a.data
    data = data_like(trained, task.format, path, a.keys)
    if trained is not None and not _has_columns(data):  # conversations, as it was trained on
        data = data_like(trained, None, path, a.keys)
    remarks: list[str] = []
    examples = pipeline.examples(data, remarks)
    options = tasks.options_of(data, a.language)
    if trained is None and task.decides == "labels" and not options.labels:
        found = [q.reference for q in tasks.questions(task, examples, options) if q.row]
        options = options._replace(labels=tasks.classification.names(found))  # it must be told what there is
    model = tuned.open_model(target, adapter, dtype).keeping(a.kv)
    with jax.set_mesh(model.mesh):
        asked = scoring.Asked(
            model.generator, model.template, a.batch_size, a.max_new_tokens, data.thinking, data.system
        )
        result = scoring.score(task, examples, options, asked, _progress(), a.max_samples)
    if task.metric == "perplexity":
        result = _with_loss(model, data, a, result)
    for remark in (*remarks, *result.remarks):
        log.say(remark)
    log.table(scoring.table(task.name, task.metric, result))
    if folder is not None:
        about = {
            "jaxtune": __version__, "model": target, "adapter": adapter, "data": a.data, "keys": a.keys, "dtype": dtype,
            "max_samples": a.max_samples, "max_new_tokens": a.max_new_tokens or task.max_new_tokens,
            "language": options.language, "prompt": options.prompt, "labels": list(options.labels),
        }  # fmt: skip
        written = scoring.write(folder, task.name, task.metric, result, about)
        log.say(f"written to {', '.join(str(f) for f in written)}")


def by_head(
    model: "Tuned",
    target: str,
    data: str,
    keys: list[str],
    batch_size: int,
    max_samples: int | None,
    folder: Path | None,
) -> None:
    """Judge rows with a model's head; print the scores, and write them where there is a folder for them."""
    from jaxtune import head_scores, scoring
    from jaxtune.data import heads as data_heads
    from jaxtune.data import pipeline

    head = model.blueprint.decoder.task
    assert head is not None
    trained = trained_as(target)
    read = data_like(trained, data_heads.READS[head.kind], data, keys)
    read = read.model_copy(update={"max_length": min(read.max_length, model.blueprint.decoder.context)})
    s = model.head_settings(read)
    assert s is not None
    remarks: list[str] = []
    examples = pipeline.examples(read, remarks)[:max_samples]
    records = data_heads.records(examples, head.kind)
    scores, rows = head_scores.evaluate(s, model.tokenizer, records, model.judge(records, s, batch_size))
    for row, record in zip(rows, records, strict=True):
        row["origin"] = record.origin
    result = scoring.Result(scores, head_scores.baseline(s, records), rows, remarks)
    for remark in remarks:
        log.say(remark)
    log.table(scoring.table(head.kind, head_scores.metric_of(s), result))
    if folder is not None:
        about = {"jaxtune": __version__, "model": target, "data": data, "keys": keys, "labels": list(head.labels)}
        written = scoring.write(folder, head.kind, head_scores.metric_of(s), result, about)
        log.say(f"written to {', '.join(str(f) for f in written)}")


def data_like(trained: "Config | None", format: str | None, path: str, keys: list[str]) -> "Data":
    """The data section for rows of a format, or of any: as a run was trained, under what the command line says."""
    own: dict[str, Any] = {"format": format or "auto"}
    if trained is not None:
        own |= {k: getattr(trained.data, k) for k in OWN}
        same = {(s.format, tuple(s.columns.items()), tuple(s.tags.items())) for s in trained.data.sources}
        source = trained.data.sources[0]
        if len(same) == 1 and (format in (None, source.format) or trained.objective in CLASSES):
            own |= {"format": format or source.format, "columns": source.columns, "tags": source.tags}
    given = config.nested({f"data.{k}": v for k, v in config.parse_overrides(keys).items()})
    return config.load(None, {"data": own}, given, {"data": {"train": path, "validation": 0.0}}).data


def _has_columns(data: "Data") -> bool:
    """Whether the first row has the columns that the format needs."""
    from jaxtune.data import formats, reading, registry
    from jaxtune.data.examples import RECORDS

    source = registry.resolve(data)[0][0]
    first = next(reading.Rows(source, data.bad_rows), None)
    if first is None:  # reading says what is wrong
        return True
    row = formats.renamed(first[1], source.columns)
    needed = RECORDS[source.format].needed if source.format in RECORDS else ()
    return "data" in row or "translation" in row or all(row.get(c) is not None for c in needed)


def trained_as(target: str) -> "Config | None":
    """The config of a run folder, None of other models."""
    from jaxtune import job

    return config.load(file) if (file := Path(target) / job.CONFIG).exists() else None


def _with_loss(model: "Tuned", data: "Data", a: Asking, result: Any) -> Any:
    """A result with loss and perplexity on the same turns."""
    from jaxtune.data import pipeline

    sources = [s.model_copy(update={"max_samples": a.max_samples}) for s in data.sources]
    room = min(data.max_length, model.blueprint.decoder.context)
    data = data.model_copy(update={"train": sources, "max_length": room})
    prepared = pipeline.prepare(data, model.tokenizer, 0, "sft", model.blueprint.virtual_ids)
    found = model.scores(prepared.rows, a.batch_size, "sft")
    values = {"perplexity": found["perplexity"], "loss": found["loss"], "token_accuracy": found["accuracy"]}
    scores = result.scores._replace(values={**values, **result.scores.values})
    return result._replace(scores=scores, remarks=[*result.remarks, *prepared.remarks])


def _progress() -> Any:
    """Says how many are answered, about every tenth of them."""
    last = -1

    def said(n: int, of: int) -> None:
        nonlocal last
        if n * 10 // of != last or n == of:
            last = n * 10 // of
            log.say(f"{n}/{of} answered")

    return said


def by_lm_eval(
    model: "Tuned",
    names: list[str],
    include: Path | None,
    batch_size: int,
    limit: int | None,
    chat_template: bool,
    folder: Path | None,
) -> None:
    """Run tasks of lm_eval; print the scores, and write them where there is a folder for them."""
    try:
        from jaxtune import harness
    except ModuleNotFoundError as e:
        raise UserError("--lm-eval: lm_eval is not installed; pip install 'jaxtune[lm-eval]'") from e
    found = harness.evaluate(model, names, include, batch_size, limit, chat_template)
    log.table(harness.table(found))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "scores_lm_eval.json"
        log.write_whole(file, json.dumps(found, indent=2, default=str) + "\n")
        log.say(f"written to {file}")
