"""Verbs that use a model: evaluate, predict, chat."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from jaxtune import config, log
from jaxtune.cli.common import Adapter, Adapters, Dtype, Kv, Target, app, dtype_of, one_of
from jaxtune.errors import UserError


@app.command()
def evaluate(
    target: Target,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DATA] [KEY=VALUE]...", help="A data file, or demo; keys of the data section."),
    ] = None,
    data_file: Annotated[str | None, typer.Option("--data", help="The data, where it is not the argument.")] = None,
    adapter: Adapter = None,
    dtype: Dtype = "float32",
    kv: Kv = "same",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 8,
    objective: Annotated[str | None, typer.Option(help="sft or pretrain; the run's own, else sft.")] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Answer the rows and score the answers: classification, qa, translation, summarisation, dialogue, "
            "maths, choice."
        ),
    ] = None,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Only the first n rows.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of a task: the longest answer.")] = None,
    language: Annotated[str | None, typer.Option(help="Of a task's answers: de, zh; seen where not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where scores and answers go; the run folder.")] = None,
    lm_eval: Annotated[str | None, typer.Option("--lm-eval", help="Tasks of lm_eval, with commas between.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder of further tasks for lm_eval.")] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="lm_eval asks through the model's chat template.")
    ] = False,
) -> None:
    """Loss, perplexity and token accuracy on a data file; or the scores of a head, of a task, or of lm_eval's.

    They are also written to scores.json in the run folder, or in --out.
    """
    from jaxtune import job, tasks, tuned
    from jaxtune.cli import scores as measure
    from jaxtune.data import pipeline
    from jaxtune.data.heads import READS

    data, keys = measure.data_and_keys(arguments or [], data_file, lm_eval is not None)
    if lm_eval is not None:
        model = tuned.open_model(target, adapter, dtype_of(dtype)).keeping(kv)
        folder = measure.folder_of(target, out)
        return measure.by_lm_eval(
            model, lm_eval.split(","), include_path, batch_size, max_samples, chat_template, folder
        )
    trained = measure.trained_as(target)
    if trained is not None and task in (trained.objective, READS.get(trained.objective)):
        task = None  # its head is scored without being asked
    if task is not None:
        asked = measure.Asking(task, data, keys, batch_size, max_samples, max_new_tokens, language, kv)
        return measure.by_task(target, adapter, dtype_of(dtype), asked, measure.folder_of(target, out))
    if kv != "same":
        raise UserError("--kv: loss is measured without a cache; it is for --task and --lm-eval")
    if objective is not None:
        one_of("--objective", objective, ["sft", "pretrain"])
    objective = objective or (trained.objective if trained else "sft")
    if data == config.DEMO:
        data = str(job.DEMO_FOLDER / "validation.jsonl")
    model, folder = tuned.open_model(target, adapter, dtype_of(dtype)), measure.folder_of(target, out)
    if model.blueprint.decoder.task is not None:
        return measure.by_head(model, target, data, keys, batch_size, max_samples, folder)
    options = measure.data_like(trained, None, data, keys)
    if trained is None or options.max_length > model.blueprint.decoder.context:
        room = min(options.max_length, model.blueprint.decoder.context)
        options = options.model_copy(update={"max_length": room})
    sources = [s.model_copy(update={"max_samples": max_samples or s.max_samples}) for s in options.sources]
    options = options.model_copy(update={"train": sources})
    prepared = pipeline.prepare(
        options, model.tokenizer, 0, objective, model.blueprint.virtual_ids, tasks.asking(options)
    )
    for remark in prepared.remarks:
        log.say(remark.replace("train:", f"{data}:"))
    scores = model.scores(prepared.rows, batch_size, objective)
    log.table([(k, f"{v:.4f}") for k, v in scores.items()])
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "scores.json"
        log.write_whole(file, json.dumps({"data": data, **scores}, indent=2) + "\n")
        log.say(f"written to {file}")


MaxNew = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Sample among the k likeliest; 0 is all.")]
TopP = Annotated[float, typer.Option(help="Sample among the likeliest that together have this probability.")]
Penalty = Annotated[float, typer.Option(help="Above 1, tokens that are there already become less likely.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be given several times.")]
Seed = Annotated[int, typer.Option(help="Of the sampling.")]


@app.command()
def predict(
    target: Target,
    file: Annotated[str, typer.Argument(help="Prompts or rows, of any kind that can be trained on.")],
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="format or columns.")] = None,
    out: Annotated[Path, typer.Option(help="Where the answers go, as JSONL.")] = Path("predictions.jsonl"),
    adapter: Adapters = None,
    dtype: Dtype = "float32",
    kv: Kv = "same",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 8,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Only the first n rows.")] = None,
    max_new_tokens: MaxNew = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    samples: Annotated[int, typer.Option(help="Answers per prompt, as a list `predictions`.")] = 1,
    beams: Annotated[int, typer.Option(help="Above 1, beam search.")] = 1,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Add the log-probability of each new token.")] = False,
    as_data: Annotated[
        bool, typer.Option("--as-data", help="Write rows that train reads: a teacher's answers, for a student.")
    ] = False,
) -> None:
    """Answer every row of a file. With several adapters, the answers of each and of none stand side by side."""
    from jaxtune import job, predicting, tuned
    from jaxtune.cli import scores as measure
    from jaxtune.data.heads import READS
    from jaxtune.generate import Sampling

    s = Sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, tuple(stop or ()), seed, samples, beams)
    if file == config.DEMO:
        file = str(job.DEMO_FOLDER / "validation.jsonl")
    model: tuned.Tuned | dict[str, tuned.Tuned]
    if adapter is not None and len(adapter) > 1:
        model = {n: m.keeping(kv) for n, m in tuned.open_models(target, adapter, dtype_of(dtype)).items()}
    else:
        model = tuned.open_model(target, adapter[0] if adapter else None, dtype_of(dtype)).keeping(kv)
    head = model.blueprint.decoder.task if isinstance(model, tuned.Tuned) else None
    data = measure.data_like(measure.trained_as(target), READS[head.kind] if head else None, file, keys or [])
    data = data.model_copy(
        update={"train": [s.model_copy(update={"max_samples": max_samples or s.max_samples}) for s in data.sources]}
    )
    n = predicting.predict(
        model, data, out, s, batch_size, lambda i, n: log.say(f"{i}/{n} answered"), logprobs, as_data
    )
    log.say(f"{n} answers written to {out}")


@app.command()
def chat(
    target: Target,
    adapter: Adapters = None,
    dtype: Dtype = "float32",
    kv: Kv = "same",
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: MaxNew = 256,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
) -> None:
    """Talk to a model: /reset forgets what was said, /exit (or the end of input) leaves.

    Adapters share the base's arrays: /adapters lists them, /adapter NAME (or none) goes on with another, and /compare
    TEXT shows what each and the base alone would answer.
    """
    from jaxtune import tuned
    from jaxtune.chat import Chat
    from jaxtune.generate import Sampling

    s = Sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, tuple(stop or ()), seed)
    dtype_of(dtype)
    models = tuned.open_models(target, adapter, dtype) if adapter else {target: tuned.open_model(target, None, dtype)}
    models = {name: m.keeping(kv) for name, m in models.items()}

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    talk = Chat(models, system, s, write)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        if text == "/exit":
            break
        try:
            talk.read(text)
        except UserError as e:
            log.say(str(e))
