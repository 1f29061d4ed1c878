"""What a run leaves behind, opened: to generate, to measure, to merge and to convert."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune import blueprint, config, evaluate, head_scores, job, log, optim, sharding, steps
from jaxtune.blueprint import Blueprint
from jaxtune.checkpoint import Checkpoints
from jaxtune.config import Config
from jaxtune.data import encode, pipeline
from jaxtune.data import heads as data_heads
from jaxtune.data.examples import Conversation, Message, Record
from jaxtune.data.heads import HeadSettings
from jaxtune.data.pipeline import Rows
from jaxtune.data.token_cache import Encoder
from jaxtune.errors import UserError
from jaxtune.generate import Generator, Sampling
from jaxtune.hf import adapters, quantized, several, soft_prompts, tokenizer
from jaxtune.layers import unbox
from jaxtune.models import heads
from jaxtune.models.decoder import DecoderConfig
from jaxtune.nodes.grid import with_int8_products
from jaxtune.nodes.product import check_qwix, with_products
from jaxtune.objectives import OBJECTIVES
from jaxtune.tuning import method as tuning_method

Tree = Any
NONE = "none"  # the name of a base without adapters


class Run:
    """A finished run folder, for notebooks, which show the curve of its loss.

    >>> run = Run(Path("runs/demo"))  # doctest: +SKIP
    >>> run.generate("What does the fox eat?", max_new_tokens=16)  # doctest: +SKIP
    ' The fox eats berries.'
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows of it: the curve of its loss."""
        file = self.folder / "loss.png"
        return file.read_bytes() if file.exists() else None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The entries of metrics.jsonl."""
        return log.read_metrics(self.folder / "metrics.jsonl")

    @property
    def config(self) -> Config:
        return config.load(self.folder / job.CONFIG)

    @functools.cached_property
    def model(self) -> "Tuned":
        """The tuned model, loaded once."""
        return open_model(str(self.folder))

    def generate(self, prompt: str, **options: Any) -> str:
        """The tuned model's answer to a prompt; options are those of `Sampling`."""
        return self.model.answer(prompt, **options)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A model ready to be used, tuned or not.

    >>> model = jaxtune.load("runs/demo")  # doctest: +SKIP
    >>> for piece in model.stream([Message("user", "What does the fox eat?")], Sampling()):  # doctest: +SKIP
    ...     print(piece, end="")
    """

    blueprint: Blueprint
    weights: Tree
    tokenizer: Any
    template: str | None
    eos: Sequence[int]
    mesh: jax.sharding.Mesh
    thinking: str = "auto"  # as the run was trained
    system: str | None = None

    @functools.cached_property
    def generator(self) -> Generator:
        if (head := self.blueprint.decoder.task) is not None:
            raise UserError(f"the model has a head for {head.kind} and says no text; use `evaluate` or `predict`")
        return Generator(self.blueprint.model, self.weights, self.tokenizer, self.eos)

    def keeping(self, kv: str) -> "Tuned":
        """The same model with keys and values held as said: "same", or "int8" with a scale for each head and token.

        Raises:
          UserError: it is neither.
        """
        if kv not in ("same", "int8"):
            raise UserError(f"--kv {kv!r} is not known; allowed: same, int8")
        decoder = dataclasses.replace(self.blueprint.decoder, kv=kv)
        return dataclasses.replace(self, blueprint=self.blueprint._replace(decoder=decoder))

    def prompt(self, messages: Sequence[Message]) -> str:
        """Messages as the model was trained to see them; as they are where it has no template."""
        if self.template is None:
            return (self.tokenizer.bos_token or "") + "".join(m.content for m in messages)
        return self.asked(Conversation(tuple(messages), "messages", "prompt"))[0]

    def asked(self, c: Conversation) -> tuple[str, str | None]:
        """A conversation's prompt by the template, and the answer that it ends with."""
        if self.template is None:
            raise UserError(f"{c.origin}: a conversation needs a chat template, and the model has none")
        return encode.prompt_text(c, self.tokenizer, self.template, self.thinking, self.system)

    def answer(self, prompt: str, **options: Any) -> str:
        """The answer to one user message."""
        with jax.set_mesh(self.mesh):
            text = self.prompt([Message("user", prompt)])
            return self.generator.generate([text], Sampling(**options))[0].text

    def stream(self, messages: Sequence[Message], s: Sampling) -> Iterator[str]:
        """The answer to a conversation, piece by piece."""
        context = self.generator.context
        room, kept = context - min(s.max_new_tokens, context // 4), list(messages)
        while len(self.tokenizer(self.prompt(kept)).input_ids) > room and len(kept) > 2:
            del kept[int(kept[0].role == "system")]  # the oldest turn that is not the system's
            log.warn(f"the conversation is longer than the model's context of {context} tokens: its oldest turns go")
        with jax.set_mesh(self.mesh):
            yield from self.generator.stream(self.prompt(kept), s)

    def judge(self, records: Sequence[Record], s: HeadSettings, batch_size: int) -> list[np.ndarray]:
        """The head's outputs for the examples of records, see `head_scores.outputs`."""
        remarks: list[str] = []
        packed = config.Data(max_length=s.room, cache=False)
        answers = ("label", "tags", "spans", "answers")  # what is right has no part in it, and may be unheard of
        records = [r._replace(row={k: v for k, v in r.row.items() if k not in answers}) for r in records]
        rows = pipeline.to_rows(records, Encoder(data_heads.encode, self.tokenizer, s), packed, "data", remarks)
        logits = jax.jit(head_scores.make_logits(steps.apply_of(self.blueprint), s.objective))
        with jax.set_mesh(self.mesh):
            return head_scores.outputs(
                logits, self.weights, rows, batch_size, steps.putter(self.mesh, None), s.objective
            )

    def head_settings(self, data: config.Data) -> HeadSettings | None:
        """How its head reads a data section's rows; None where it is a language model."""
        head = self.blueprint.decoder.task
        if head is None:
            return None
        data = data.model_copy(update={"max_length": min(data.max_length, self.blueprint.decoder.context)})
        if data.truncate == "drop":  # every row gets an answer
            data = data.model_copy(update={"truncate": "right"})
        return pipeline.head_settings(data, head.kind, head.labels, head.multi)

    @functools.cached_property
    def _sums(self) -> dict[str, evaluate.Sums]:
        """By objective; compiled once."""
        return {}

    def scores(self, rows: Rows, batch_size: int, objective: str, weights: Tree = None) -> dict[str, float]:
        """Loss, perplexity and token accuracy on rows, of its weights or of others of the same form."""
        if objective not in self._sums:
            self._sums[objective] = jax.jit(evaluate.make_sums(steps.apply_of(self.blueprint), OBJECTIVES[objective]))
        given = self.weights if weights is None else weights
        with jax.set_mesh(self.mesh):
            return evaluate.scores(self._sums[objective], given, rows, batch_size, steps.putter(self.mesh, None))


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
        opened = ready(open_weights(target, adapter, dtype, on), on)
    if (file := Path(target) / job.CONFIG).exists():
        data = config.load(file).data
        return dataclasses.replace(opened, thinking=data.thinking, system=data.system)
    return opened


def open_models(
    base: str, folders: Sequence[str], dtype: str = "float32", mesh: config.Mesh | None = None
) -> dict[str, Tuned]:
    """A base under each of several adapters and under none (`NONE`, the last), by name, see `names`.

    The base is read once and its arrays are shared; what an adapter brings whole is its own. On CPU each layer is a
    group, as `Generator` wants it, so nothing is copied there either. Elsewhere layers are grouped as suits all: where
    the adapters' ranks or targets differ by layer there are more groups, so more is compiled.

    Raises:
      UserError: the base or an adapter cannot be opened, or an adapter is given twice.
    """
    job.use_compile_cache()
    on = sharding.make_mesh(mesh or config.Mesh())
    model = job.model_folder(base)
    read = {name: soft_prompts.open_adapter(Path(f)) for name, f in zip(names(folders), folders, strict=True)}
    groups = None
    if jax.default_backend() != "cpu":
        groups = _common([draw(model, a, on, dtype).decoder.groups for a in [None, *read.values()]])
    shared = share(model, on, dtype, groups)
    return {**{name: shared.under(a) for name, a in read.items()}, NONE: shared.alone()}


class Shared(NamedTuple):
    """A base that was read once, for adapters that come and go."""

    blueprint: Blueprint
    weights: Tree  # `Weight`s
    mesh: jax.sharding.Mesh

    def under(self, a: adapters.Adapter | soft_prompts.SoftPrompts) -> Tuned:
        """The base under an adapter: its arrays are shared, what the adapter brings whole is its own.

        Raises:
          UserError: the adapter does not fit the base, or not its groups of layers.
        """
        model, c = self.blueprint.folder, self.blueprint.decoder
        with jax.set_mesh(self.mesh):
            b = draw(model, a, self.mesh, c.dtype, c.groups)
            kept = blueprint.from_folder(b, self.weights)
            weights = blueprint.materialise(b, jax.random.key(0), shared=kept)
            a.check_all_used()
            return ready(Opened(b, weights, job.tokenizer_folder(model, a)), self.mesh)

    def alone(self) -> Tuned:
        """The base as it is."""
        return ready(Opened(self.blueprint, self.weights, self.blueprint.folder), self.mesh)


def share(model: Path, on: jax.sharding.Mesh, dtype: str, groups: Sequence[int] | None = None) -> Shared:
    """Read a model's folder; `groups` as of `draw`, but on CPU each layer is one, as `Generator` wants it.

    Raises:
      UserError: it cannot be opened.
    """
    plain = draw(model, None, on, dtype, groups)
    if jax.default_backend() == "cpu":
        plain = draw(model, None, on, dtype, (1,) * plain.decoder.layers)
    with jax.set_mesh(on):
        return Shared(plain, blueprint.materialise(plain, jax.random.key(0)), on)


def names(folders: Sequence[str]) -> list[str]:
    """Names of adapters: the shortest ends of their paths that differ, `export` of runs left out.

    >>> names(["runs/sums/export", "runs/poems/export"]), names(["a/one", "b/one"])
    (['sums', 'poems'], ['a/one', 'b/one'])

    Raises:
      UserError: two are the same.
    """
    paths = [Path(f).absolute() for f in folders]
    parts = [(p.parent if p.name == job.EXPORT else p).parts for p in paths]
    for n in range(1, max(map(len, parts), default=0) + 1):
        short = ["/".join(p[-n:]) for p in parts]
        if len({*short, NONE}) > len(short):
            return short
    raise UserError(f"--adapter: one of {', '.join(folders)} is given twice; give it once")


def _common(plans: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The largest groups of layers that span no two groups of any plan.

    >>> _common([(4, 2), (3, 3)])
    (3, 1, 2)
    """
    ends = sorted({end for plan in plans for end in itertools.accumulate(plan)})
    return tuple(b - a for a, b in itertools.pairwise([0, *ends]))


def ready(found: "Opened", on: jax.sharding.Mesh) -> Tuned:
    """What was opened, with its tokenizer, template and ends."""
    words = found.tokenizer or tokenizer.load(found.side)
    template = found.template or words.chat_template
    eos = {*tokenizer.eos_ids(found.blueprint.folder, words), *encode.turn_end(words, template)}
    weights = unbox(found.weights)
    given = blueprint.read_config(found.blueprint.folder).get(quantized.KEY)
    if (matmuls := quantized.rounds_activations(given)) == "int8":
        weights = with_int8_products(weights)
    elif matmuls == "fp8":
        check_qwix(f"{found.blueprint.folder}: rounds activations to fp8, which")
        weights = with_products(weights, "fp8")
    return Tuned(found.blueprint, weights, words, template, sorted(eos), on)


class Opened(NamedTuple):
    """A blueprint, its `Weight`s, the folder of the tokenizer, and what is not as it is there: template, tokenizer."""

    blueprint: Blueprint
    weights: Tree
    side: Path
    template: str | None = None
    tokenizer: Any = None


def open_weights(
    target: str,
    adapter: str | Mapping[str, float] | None,
    dtype: str | None,
    mesh: jax.sharding.Mesh,
    base: bool = True,
) -> Opened:
    """What `target` names, under an adapter or several with their weights.

    Without `base`, weights that were not trained stay abstract, see `materialise`.
    """
    folder = Path(target)
    if adapter is None and (folder / job.CONFIG).exists():
        if (folder / job.EXPORT).exists():
            return open_weights(str(folder / job.EXPORT), None, dtype, mesh, base)
        return _from_checkpoint(folder, dtype, base)
    if adapter is None and (folder / adapters.CONFIG).exists():
        adapter = target
        target = soft_prompts.open_adapter(folder).base
    model = job.model_folder(target)
    if adapter is None and (model / adapters.CONFIG).exists():  # an adapter of the hub
        return open_weights(str(model), None, dtype, mesh, base)
    read = several.read(adapter) if adapter is not None else None
    b = draw(model, read, mesh, dtype or "float32")
    weights = blueprint.materialise(b, jax.random.key(0), base)
    if read is None:
        return Opened(b, weights, model)
    read.check_all_used()
    return Opened(b, weights, job.tokenizer_folder(model, read))


def draw(
    model: Path,
    read: adapters.Adapter | soft_prompts.SoftPrompts | None,
    mesh: jax.sharding.Mesh,
    dtype: str = "float32",
    groups: Sequence[int] | None = None,
) -> Blueprint:
    """The blueprint of a model folder under an adapter, nothing of which trains."""

    def method(decoder: DecoderConfig) -> tuning_method.Method:
        frozen = tuning_method.Method(tuning_method.leave, [("", tuning_method.FROZEN)])
        if read is None:
            return frozen
        return frozen._replace(wrap=read.on(decoder), made=True, virtual=read.virtual)

    vocab = read.rows() if read else None
    task: Any = "own"
    if (side := getattr(read, "folder", None)) is not None and (side / "config.json").exists():
        task = heads.from_hf(blueprint.read_config(side))  # an adapter that brings a head says so there
    return blueprint.draw(model, method, mesh, dtype, adapter=read, vocab=vocab, groups=groups, task=task)


def _from_checkpoint(folder: Path, dtype: str | None, base: bool) -> Opened:
    """The newest checkpoint of a run that has no export yet; the run may be going on."""
    c = config.load(folder / job.CONFIG)
    if dtype is not None:
        c = c.model_copy(update={"train": c.train.model_copy(update={"compute_dtype": dtype, "remat": "none"})})
    checkpoints = Checkpoints(folder / job.CHECKPOINTS, read_only=True)
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
    trained = tuning_method.student(optim.averaged(restored["optimiser"], restored["trainable"]))
    weights = tuning_method.join(trained, frozen)
    return Opened(b, blueprint.boxed(b, weights), b.folder, template, started.tokenizer)
