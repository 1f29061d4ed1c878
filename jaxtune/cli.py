"""The command line: `jaxtune VERB …`, with `key=value` over any config.

Exit codes: 0 done, 2 something that the user can put right (one line says what), 75 stopped and saved, run it again.
"""

import errno
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxtune import config, log
from jaxtune.errors import Interrupted, UserError, nearest

RESUME_ME = 75  # EX_TEMPFAIL of sysexits.h

app = typer.Typer(
    name="jaxtune",
    help="Fine-tune large language models with JAX. `jaxtune VERB --help` tells more of a verb.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes = typer.Typer(help="The configs that come along.", no_args_is_help=True)
app.add_typer(recipes, name="recipes")

Pairs = Annotated[
    list[str] | None, typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="A YAML file, and values over it.")
]
Target = Annotated[str, typer.Argument(help="A run folder, an export, or a model folder in Hugging Face format.")]
Adapter = Annotated[str | None, typer.Option(help="A PEFT adapter folder to put on the model.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="A PEFT adapter folder to put on the model; several, to compare them."),
]
Dtype = Annotated[str, typer.Option(help="Compute in float32 or bfloat16.")]


def _config(arguments: list[str] | None) -> config.Config:
    """The config that the arguments of a verb name: a file, if the first is none of key=value, and values over it."""
    rest = list(arguments or [])
    file = Path(rest.pop(0)) if rest and "=" not in rest[0] else None
    if file is None and not rest:
        raise UserError("neither a config nor a key=value was given; `jaxtune recipes ls` lists configs")
    return config.load(file, config.parse_overrides(rest))


@app.command()
def train(arguments: Pairs = None) -> None:
    """Tune a model as CONFIG says, and export it. Run the same command again to go on after a stop."""
    from jaxtune import run

    run.train(_config(arguments))


@app.command()
def validate(arguments: Pairs = None) -> None:
    """Check CONFIG, files, columns, lengths, memory and disk, before any device is touched."""
    import jax

    from jaxtune import job

    c = _config(arguments)
    jax.config.update("jax_platforms", "cpu")
    if (devices := math.prod(n for n in (c.mesh.data, c.mesh.fsdp, c.mesh.expert, c.mesh.tensor) if n > 0)) > 1:
        jax.config.update("jax_num_cpu_devices", devices)  # the mesh is that of another machine
    log.table(job.validate(c))
    log.say("valid")


@app.command()
def evaluate(
    target: Target,
    data: Annotated[str, typer.Argument(help="A JSONL or CSV file, or demo.")],
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the data section.")
    ] = None,
    adapter: Adapter = None,
    dtype: Dtype = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 8,
    objective: Annotated[str | None, typer.Option(help="sft or pretrain; the run's own, else sft.")] = None,
) -> None:
    """Loss, perplexity and token accuracy on a data file; also written to scores.json in a run folder."""
    from jaxtune import job, run, tuned
    from jaxtune.data import pipeline

    trained = config.load(Path(target) / run.CONFIG) if (Path(target) / run.CONFIG).exists() else None
    objective = objective or (trained.objective if trained else "sft")
    _one_of("--objective", objective, ["sft", "pretrain"])
    if data == config.DEMO:
        data = str(job.DEMO_FOLDER / "validation.jsonl")
    model = tuned.open_model(target, adapter, _dtype(dtype))
    context = model.blueprint.decoder.context
    own = {k: getattr(trained.data, k) for k in ("max_length", "packing", "train_on")} if trained else {}
    base = {"data": {"max_length": min(1024, context), **own}}
    given = config.nested({f"data.{k}": v for k, v in config.parse_overrides(keys or []).items()})
    options = config.load(None, base, given, {"data": {"train": data, "validation": 0.0}}).data
    prepared = pipeline.prepare(options, model.tokenizer, 0, objective, model.blueprint.virtual_ids)
    for remark in prepared.remarks:
        log.say(remark.replace("train:", f"{data}:"))
    scores = model.scores(prepared.train, batch_size, objective)
    log.table([(k, f"{v:.4f}") for k, v in scores.items()])
    if (Path(target) / run.CONFIG).exists():
        file = Path(target) / "scores.json"
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
    file: Annotated[str, typer.Argument(help="A JSONL or CSV file of prompts, in any of the data formats.")],
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="format or columns.")] = None,
    out: Annotated[Path, typer.Option(help="Where the answers go, as JSONL.")] = Path("predictions.jsonl"),
    adapter: Adapters = None,
    dtype: Dtype = "float32",
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
) -> None:
    """Answer every row of a file. With several adapters, the answers of each and of none stand side by side."""
    from jaxtune import job, tuned
    from jaxtune.generate import Sampling

    s = Sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, tuple(stop or ()), seed, samples, beams)
    if file == config.DEMO:
        file = str(job.DEMO_FOLDER / "validation.jsonl")
    model: tuned.Tuned | dict[str, tuned.Tuned]
    if adapter is not None and len(adapter) > 1:
        model = tuned.open_models(target, adapter, _dtype(dtype))
    else:
        model = tuned.open_model(target, adapter[0] if adapter else None, _dtype(dtype))
    given = config.nested({f"data.{k}": v for k, v in config.parse_overrides(keys or []).items()})
    given = {"data": {**given.get("data", {}), "train": file}}
    source = config.load(None, given).data.sources[0].model_copy(update={"max_samples": max_samples})
    n = tuned.predict(model, source, out, s, batch_size, lambda i, n: log.say(f"{i}/{n} answered"), logprobs)
    log.say(f"{n} answers written to {out}")


@app.command()
def chat(
    target: Target,
    adapter: Adapters = None,
    dtype: Dtype = "float32",
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
    _dtype(dtype)
    models = tuned.open_models(target, adapter, dtype) if adapter else {target: tuned.open_model(target, None, dtype)}

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


@app.command()
def merge(
    target: Annotated[
        str, typer.Argument(help="A run folder, a PEFT adapter folder, or the base of the adapters that are given.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER[=WEIGHT]",
            help="A PEFT adapter folder, and what its change is multiplied by, 1 where not given; several add up.",
        ),
    ] = None,
    as_adapter: Annotated[
        bool, typer.Option("--as-adapter", help="Write one LoRA adapter, its rank the sum of theirs, instead.")
    ] = False,
) -> None:
    """Write a tuned model as one whole Hugging Face folder, adapters merged into the weights."""
    from jaxtune import convert
    from jaxtune.hf import several

    weights = several.weighted(adapter or [])
    if as_adapter:
        convert.write_adapter(target, out, weights)
    else:
        convert.write_model(target, out, weights)
    log.say(f"written to {out}")


@app.command("convert")
def convert_(
    source: Annotated[
        str,
        typer.Argument(help="A run, an export, a model folder or cache; llama2.c's .bin; a folder of Meta's .pth."),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    to: Annotated[str, typer.Option(help="hf: a Hugging Face folder; orbax: a cache to start from in seconds.")] = "hf",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; the source's own where not given.")
    ] = None,
    shard_size: Annotated[float, typer.Option(min=1e-6, help="The largest file, in GB (10⁹ bytes).")] = 5.0,
) -> None:
    """Write a model in another form, dtype or size of files. After a kill the same command goes on."""
    from jaxtune import convert

    convert.write_model(source, out, None, dtype, to, int(shard_size * 1e9))
    log.say(f"written to {out}")


@app.command()
def presets(name: Annotated[str | None, typer.Argument(help="A preset, whose config.json is printed.")] = None) -> None:
    """List the model sizes that are known by name, for planning without weights; or print one's config.json."""
    from jaxtune.models import families
    from jaxtune.models.presets import PARAMETERS, PRESETS

    if name is None:
        rows = [(n, families.from_hf(c, n)) for n, c in PRESETS.items()]
        return log.table(
            [(n, f"{PARAMETERS[n] / 1e9:7.2f}B  {d.family}, {d.layers} layers × {d.embed}") for n, d in rows]
        )
    if name not in PRESETS:
        raise UserError(f"preset {name!r} does not exist{nearest(name, list(PRESETS))}")
    log.say(json.dumps(PRESETS[name], indent=2))


@app.command("config-schema")
def config_schema() -> None:
    """The JSON schema of a config, for editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **config.Config.model_json_schema()}
    log.say(json.dumps(schema, indent=2))


def recipe_folder() -> Path:
    """Where the configs are: in the installed package, or beside it in a checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def _recipe(name: str) -> Path:
    known = {p.stem: p for p in recipe_folder().glob("*.yaml")}
    if name.removesuffix(".yaml") not in known:
        raise UserError(f"recipe {name!r} does not exist{nearest(name, list(known))}")
    return known[name.removesuffix(".yaml")]


@recipes.command("ls")
def recipes_ls() -> None:
    """List the recipes, with the first line of each."""
    files = sorted(recipe_folder().glob("*.yaml"))
    log.table([(f.stem, f.read_text().splitlines()[0].lstrip("# ")) for f in files])


@recipes.command("show")
def recipes_show(name: str) -> None:
    """Print a recipe."""
    log.say(_recipe(name).read_text().rstrip())


@recipes.command("cp")
def recipes_cp(name: str, target: Annotated[Path, typer.Argument(help="A folder or a file.")] = Path()) -> None:
    """Copy a recipe, to make it one's own."""
    source = _recipe(name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise UserError(f"{target}: exists already; choose another name")
    shutil.copyfile(source, target)
    log.say(f"copied to {target}")


def _one_of(option: str, value: str, allowed: list[str]) -> None:
    if value not in allowed:
        raise UserError(f"{option} {value!r} is not known; allowed: {', '.join(allowed)}")


def _dtype(value: str) -> str:
    _one_of("--dtype", value, ["float32", "bfloat16"])
    return value


def main(arguments: list[str] | None = None) -> Any:
    """Run a verb; errors become one line and an exit code, or a stack trace with --debug."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    try:
        app([a for a in arguments if a != "--debug"], standalone_mode=True)
    except UserError as e:
        if debug:
            raise
        _fail(str(e))
    except OSError as e:
        if debug or e.errno is None:
            raise
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room" if full else "look at the path and its rights; --debug shows where"
        _fail(f"{e.filename or 'disk'}: {e.strerror}; {remedy}")
    except Interrupted as e:
        _fail(str(e), RESUME_ME)


def _fail(message: str, code: int = 2) -> None:
    print(f"{'error' if code == 2 else 'stopped'}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)
