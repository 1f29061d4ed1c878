"""What a run leaves behind, opened: to generate, to measure, to merge and to convert."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxtune import blueprint, config, evaluate, job, log, optim, run, sharding
from jaxtune.blueprint import Blueprint
from jaxtune.checkpoint import Checkpoints
from jaxtune.config import Config
from jaxtune.data import encode, formats
from jaxtune.data.pipeline import Rows
from jaxtune.errors import UserError
from jaxtune.generate import Generation, Generator, Sampling
from jaxtune.hf import adapters, soft_prompts, tokenizer
from jaxtune.layers import unbox
from jaxtune.models.decoder import DecoderConfig
from jaxtune.objectives import OBJECTIVES
from jaxtune.tuning import method as tuning_method

Tree = Any


class Run:
    """A finished run folder, for notebooks."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The entries of metrics.jsonl."""
        return log.read_metrics(self.folder / "metrics.jsonl")

    @property
    def config(self) -> Config:
        return config.load(self.folder / run.CONFIG)

    @functools.cached_property
    def model(self) -> "Tuned":
        """The tuned model, loaded once."""
        return open_model(str(self.folder))

    def generate(self, prompt: str, **options: Any) -> str:
        """The tuned model's answer to a prompt; options are those of `Sampling`."""
        return self.model.answer(prompt, **options)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A model ready to be used, tuned or not."""

    blueprint: Blueprint
    weights: Tree
    tokenizer: Any
    template: str | None
    eos: Sequence[int]
    mesh: jax.sharding.Mesh

    @functools.cached_property
    def generator(self) -> Generator:
        return Generator(self.blueprint.model, self.weights, self.tokenizer, self.eos)

    def prompt(self, messages: Sequence[formats.Message]) -> str:
        """Messages as the model was trained to see them; as they are where it has no template."""
        if self.template is None:
            return (self.tokenizer.bos_token or "") + "".join(m.content for m in messages)
        return encode.prompt_text(
            formats.Conversation(tuple(messages), "messages", "prompt"), self.tokenizer, self.template
        )[0]

    def answer(self, prompt: str, **options: Any) -> str:
        """The answer to one user message."""
        with jax.set_mesh(self.mesh):
            text = self.prompt([formats.Message("user", prompt)])
            return self.generator.generate([text], Sampling(**options))[0].text

    def stream(self, messages: Sequence[formats.Message], s: Sampling) -> Iterator[str]:
        """The answer to a conversation, piece by piece."""
        context = self.generator.context
        room, kept = context - min(s.max_new_tokens, context // 4), list(messages)
        while len(self.tokenizer(self.prompt(kept)).input_ids) > room and len(kept) > 2:
            del kept[int(kept[0].role == "system")]  # the oldest turn that is not the system's
            log.warn(f"the conversation is longer than the model's context of {context} tokens: its oldest turns go")
        with jax.set_mesh(self.mesh):
            yield from self.generator.stream(self.prompt(kept), s)

    def scores(self, rows: Rows, batch_size: int, objective: str) -> dict[str, float]:
        """Loss, perplexity and token accuracy on rows."""
        sums = jax.jit(evaluate.make_sums(job.apply_of(self.blueprint), OBJECTIVES[objective]))
        with jax.set_mesh(self.mesh):
            return evaluate.scores(sums, self.weights, rows, batch_size, job.putter(self.mesh, None))


def open_model(
    target: str, adapter: str | None = None, dtype: str = "float32", mesh: config.Mesh | None = None
) -> Tuned:
    """A run folder, an export, a Hugging Face folder or hub id, or a base with an adapter, ready to be used.

    Raises:
      UserError: it is none of these, or is damaged.
    """
    job.use_compile_cache()
    on = sharding.make_mesh(mesh or config.Mesh())
    with jax.set_mesh(on):
        found = open_weights(target, adapter, dtype, on)
    words = tokenizer.load(found.side)
    template = found.template or words.chat_template
    eos = {*tokenizer.eos_ids(found.blueprint.folder, words), *encode.turn_end(words, template)}
    return Tuned(found.blueprint, unbox(found.weights), words, template, sorted(eos), on)


class Opened(NamedTuple):
    """A blueprint, its `Weight`s, the folder of the tokenizer, and the template where it is not the tokenizer's."""

    blueprint: Blueprint
    weights: Tree
    side: Path
    template: str | None = None


def open_weights(
    target: str, adapter: str | None, dtype: str | None, mesh: jax.sharding.Mesh, base: bool = True
) -> Opened:
    """What `target` names; without `base`, weights that were not trained stay abstract, see `materialise`."""
    folder = Path(target)
    if adapter is None and (folder / run.CONFIG).exists():
        if (folder / run.EXPORT).exists():
            return open_weights(str(folder / run.EXPORT), None, dtype, mesh, base)
        return _from_checkpoint(folder, dtype, base)
    if adapter is None and (folder / adapters.CONFIG).exists():
        adapter = target
        target = soft_prompts.open_adapter(folder).base
    model = job.model_folder(target)
    read = soft_prompts.open_adapter(Path(adapter)) if adapter is not None else None

    def method(decoder: DecoderConfig) -> tuning_method.Method:
        frozen = tuning_method.Method(tuning_method.leave, [("", tuning_method.FROZEN)])
        if read is None:
            return frozen
        wrap = read.on(decoder) if isinstance(read, soft_prompts.SoftPrompts) else read.wrap
        return frozen._replace(wrap=wrap, made=True, virtual=read.virtual)

    b = blueprint.draw(model, method, mesh, dtype or "float32", adapter=read, vocab=read.rows() if read else None)
    weights = blueprint.materialise(b, jax.random.key(0), base)
    if read is None:
        return Opened(b, weights, model)
    read.check_all_used()
    return Opened(b, weights, job.tokenizer_folder(model, read))


def _from_checkpoint(folder: Path, dtype: str | None, base: bool) -> Opened:
    """The newest checkpoint of a run that has no export yet; the run may be going on."""
    c = config.load(folder / run.CONFIG)
    if dtype is not None:
        c = c.model_copy(update={"train": c.train.model_copy(update={"compute_dtype": dtype, "remat": "none"})})
    checkpoints = Checkpoints(folder / run.CHECKPOINTS, read_only=True)
    if (newest := checkpoints.newest) is None:
        raise UserError(
            f"{folder}: the run has neither an export nor a checkpoint yet; `jaxtune train` goes on with it"
        )
    started = job.prepare(c)
    restored, _ = checkpoints.restore(newest, started.state.saved())
    template = checkpoints.about(newest).get("template")
    checkpoints.close()
    b = started.blueprint
    _, frozen = tuning_method.split(unbox(blueprint.materialise(b, jax.random.key(c.train.seed), base)), b.labels)
    log.say(f"{folder}: not finished; takes its checkpoint of step {newest}")
    weights = tuning_method.join(optim.averaged(restored["optimiser"], restored["trainable"]), frozen)
    return Opened(b, blueprint.boxed(b, weights), b.folder, template)


def predict(
    tuned: Tuned,
    source: config.Source,
    out: Path,
    s: Sampling,
    batch_size: int,
    said: Callable[[int, int], None],
    logprobs: bool = False,
) -> int:
    """Answer every row of a file, to JSONL with `prompt`, `prediction`, `finish` and, where there is one, `reference`.

    With `logprobs` also those of each new token. With more than one sample `predictions`, `finish` and `logprobs` are
    lists, one entry per sample.

    Returns: the number of rows. The file appears when it is complete.
    """
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name a file for the answers")
    examples = formats.read(source, answers=False)
    pairs: list[tuple[str, str | None]] = []
    for e in examples:
        if isinstance(e, formats.Document):
            pairs.append(((tuned.tokenizer.bos_token or "") + e.text, None))
        elif tuned.template is not None:
            pairs.append(encode.prompt_text(e, tuned.tokenizer, tuned.template))
        elif [m.role for m in e.messages] in (["user"], ["user", "assistant"]):
            pairs.append((tuned.prompt(e.messages[:1]), e.messages[1].content if len(e.messages) > 1 else None))
        else:
            raise UserError(f"{e.origin}: a conversation needs a chat template, and the model has none")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("w", encoding="utf-8") as f, jax.set_mesh(tuned.mesh):
            for i in range(0, len(pairs), batch_size):
                part = pairs[i : i + batch_size]
                made = tuned.generator.generate([p for p, _ in part], s)
                for j, (prompt, reference) in enumerate(part):
                    row = {"prompt": prompt, **_row(made[j * s.samples : (j + 1) * s.samples], logprobs)}
                    row |= {} if reference is None else {"reference": reference}
                    f.write(json.dumps(row, ensure_ascii=False) + "\n")
                said(min(i + batch_size, len(pairs)), len(pairs))
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return len(pairs)


def _row(made: Sequence[Generation], logprobs: bool) -> dict[str, Any]:
    """What `predict` writes of the texts of one prompt."""
    columns: dict[str, list] = {"prediction": [g.text for g in made], "finish": [g.finish for g in made]}
    if logprobs:
        columns["logprobs"] = [g.logprobs for g in made]
    if len(made) == 1:
        return {k: v[0] for k, v in columns.items()}
    return {"predictions" if k == "prediction" else k: v for k, v in columns.items()}
