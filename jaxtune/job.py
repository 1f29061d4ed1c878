"""A run before its weights are read: data, shapes, shardings, the optimiser's shapes, and the compiled step.

The composition root: here a config becomes model, method, objective, data and step. `validate` stops here, and planning
can; `run.train` goes on from the same values, so what is promised is what trains.

Dimensions: A micro-batches of a step, R rows of a batch, B rows of a micro-batch, T time.
"""

import dataclasses
import hashlib
import importlib.metadata
import os
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtune import blueprint, card, chips, config, distributed, from_run, log, optim, sharding, tasks, teacher, tuning
from jaxtune.blueprint import Blueprint
from jaxtune.config import DEMO, Config
from jaxtune.data import pipeline
from jaxtune.data.pipeline import Prepared
from jaxtune.errors import UserError
from jaxtune.hf import adapters, files, remote, soft_prompts, tokenizer
from jaxtune.layers import is_weight, unbox
from jaxtune.metrics.base import better
from jaxtune.models import families
from jaxtune.models.heads import CLASSES, TaskHead
from jaxtune.models.presets import PRESETS
from jaxtune.nodes.grid import Scheme, check_group, fake_quantized
from jaxtune.nodes.product import check_qwix
from jaxtune.teacher import Teacher
from jaxtune.training import State
from jaxtune.tuning import blocks
from jaxtune.tuning import method as tuning_method
from jaxtune.tuning.zeros import keeping
from jaxtune.weights import path_name

Tree = Any
DEMO_FOLDER = Path(__file__).parent / "demo"
EXPORT, EXPORTS, CHECKPOINTS, CONFIG = "export", "exports", "checkpoints", "config.yaml"  # parts of a run folder


# --- where things are -----------------------------------------------------------------------------------------------


def model_folder(name: str) -> Path:
    """The folder of a model: the demo's, a local one, a run's (see `from_run`), a remote one's small files, or a
    snapshot of a hub repository.

    Raises:
      UserError: there is no such folder, and it is not a hub id that can be had.
    """
    if name == DEMO:
        return DEMO_FOLDER / "model"
    folder = Path(name).expanduser()
    if folder.is_dir() and from_run.is_run(folder):
        return from_run.model_folder(folder, prepare)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"model {name}: is a file; give the folder that it lies in, with its config.json beside it")
    if "://" in name:
        return remote.fetch(name.rstrip("/"))
    if name in PRESETS:
        raise UserError(f"model {name}: a preset has no weights and no tokenizer; give a folder or a hub id")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise UserError(f"model {name}: no such folder")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    weights = ["*.safetensors", "*.safetensors.index.json"]
    wanted = [*files.SIDE_FILES, *files.LICENCE_FILES, adapters.CONFIG, card.FILE, *weights]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=["consolidated*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        raise UserError(
            f"model {name}: neither a folder here nor to be had from the hub ({type(e).__name__}); give "
            "a local folder, or look at the name, the network and `hf auth login`"
        ) from e


def data_with_demo(data: config.Data) -> config.Data:
    """The data section with "demo" turned into the files that come with the package."""
    if data.train != DEMO:
        return data
    held = (
        data.validation
        if isinstance(data.validation, str) or data.validation
        else str(DEMO_FOLDER / "validation.jsonl")
    )
    return data.model_copy(update={"train": str(DEMO_FOLDER / "train.jsonl"), "validation": held})


def use_compile_cache() -> None:
    """Keep compiled programs on disk, in JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "jaxtune" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


# --- the job ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """A run before its weights are read."""

    config: Config
    data: Prepared
    tokenizer: Any
    blueprint: Blueprint
    mesh: jax.sharding.Mesh
    steps: int
    rows: int | None  # of all steps, where epochs are asked for
    state: State  # abstract, with shardings
    tx: Any
    teacher: Teacher | None = None

    def knobs(self) -> Tree:
        """What the compiled step takes beside state and batch, see `optim.knobs`."""
        trainable = tuning_method.split(self.weights, self.labels)[0]
        return optim.knobs(self.config.optim, self.steps, trainable, self.blueprint.method.rates)

    def turned(self, knobs: Tree) -> optax.GradientTransformation:
        """`tx` with other numbers, which may be traced."""
        return optimiser(self.config, self.blueprint.method, self.weights, self.labels, self.steps, knobs)

    @property
    def about(self) -> dict[str, Any]:
        """What a checkpoint remembers of its run."""
        held = self.data.validation
        taught = {} if self.teacher is None else {"teacher_digest": _digest(self.teacher.blueprint)}
        return {
            "config": self.config.model_dump(mode="json"),
            "steps": self.steps,
            "data_digest": self.data.train.digest(),
            "validation_digest": held.digest() if held else None,
            "model_digest": _digest(self.blueprint),
            **taught,
            "template": self.data.template,
            "versions": {p: importlib.metadata.version(p) for p in ("jax", "flax", "optax", "orbax-checkpoint")},
        }

    @property
    def weights(self) -> Tree:
        """All weights of the state, abstract, see `teacher.Teacher`."""
        own = self.blueprint.weights
        return own if self.teacher is None else self.teacher.weights(own)

    @property
    def labels(self) -> Tree:
        """Of all weights of the state."""
        own = self.blueprint.labels
        return own if self.teacher is None else self.teacher.labels(own)


def materialise(job: Job) -> Tree:
    """All weights of the state: `Weight`s with their arrays, the model's and those beside it."""
    key = jax.random.key(job.config.train.seed)
    boxes = blueprint.materialise(job.blueprint, key)
    return boxes if job.teacher is None else job.teacher.materialise(boxes, key)


def _digest(b: Blueprint) -> str:
    """Of the base model: its config, and the sizes and names of its tensors."""
    h = hashlib.blake2b((b.folder / "config.json").read_bytes(), digest_size=16)
    for name, ts in sorted(b.tensors.items()):
        h.update(f"{name} {[(t.dtype.name, t.shape) for t in ts]}".encode())
        if isinstance(ts[0], files.Tensor):  # elsewhere a look would read the whole tensor
            h.update(ts[0].open().reshape(-1)[:4096].tobytes())
    return h.hexdigest()


def prepare(c: Config) -> Job:
    """Everything of a run that needs no weights: data, shapes, shardings, the optimiser's shapes.

    Raises:
      UserError: something of the config, the files or the data does not fit.
    """
    folder = model_folder(c.model)
    decoder = families.from_hf(blueprint.read_config(folder), str(folder / "config.json"))  # likely mistakes first
    read = going_on(c.tuning) if isinstance(c.tuning, config.Lora) else None
    rows = max(decoder.vocab, (read.rows() or 0) if read is not None else 0)
    side = tokenizer_folder(folder, read)
    words = tokenizer.load(side)
    vocab = vocabulary(c.vocabulary, words, rows, str(side))
    first = blueprint.table_rows(vocab, c.vocabulary.multiple)
    virtual = range(first, first + (c.tuning.tokens if isinstance(c.tuning, config.Prompt) else 0))
    if c.objective in CLASSES and isinstance(c.tuning, config.Prompt | config.Prefix):
        raise UserError(
            f"objective {c.objective}: tuning.method={c.tuning.method} exports a prompt alone, without the head; take "
            "lora, ia3, freeze or full"
        )
    sets = data_with_demo(c.data)
    ask = tasks.asking(sets) if c.objective in ("sft", "pretrain") else None
    data = pipeline.prepare(sets, words, c.train.seed, c.objective, virtual, ask)
    check_evaluation(c, data)
    head = TaskHead(c.objective, data.labels, data.multi) if c.objective in CLASSES else None
    if head is not None and not head.opens_in_transformers(decoder.family):
        log.warn(
            f"transformers has no {decoder.family} with a head for {c.objective}: the export opens in jaxtune only"
        )
    if c.train.matmuls != "same":
        check_qwix()
    if c.train.reduce_dtype == "bfloat16" and c.train.compute_dtype == "float32":
        raise UserError(
            "train.reduce_dtype=bfloat16: gradients computed in float32 are added up in it; leave it out, or set "
            "train.compute_dtype=bfloat16"
        )
    mesh = sharding.make_mesh(c.mesh)
    for rows_of in (data.train, data.validation) if data.validation else (data.train,):
        for length in getattr(rows_of, "buckets", ()) or (rows_of.length,):
            sharding.check_length(mesh, length)
    steps, row_count = data.train.extent(c.train.batch_size, c.train.epochs, c.train.steps, c.train.seed)
    training = tuning_method.Training(steps, c.optim, c.train, lambda text: words(text).input_ids)
    b = blueprint.draw(
        folder, lambda d: make_method(c.tuning, read, d, training), mesh, c.train.compute_dtype, c.train.remat, read,
        vocab, c.vocabulary.multiple, c.train.param_dtype, task=head, seed=c.train.seed, attention=c.train.attention,
        rules=sharding.rules(c.mesh),
    )  # fmt: skip
    if c.train.qat != "none":
        _check_qat(c, b)
    if read is not None:
        read.check_all_used()
    if b.decoder.vocab > rows and isinstance(c.tuning, config.Prompt | config.Prefix):
        raise UserError(
            f"vocabulary: tuning.method={c.tuning.method} exports a prompt alone, without new tokens' embeddings; add "
            "none, or take method: lora with train: [embeddings, head]"
        )
    if b.decoder.vocab > rows and not _tables_train(b):
        log.warn(
            "vocabulary: the new tokens' embeddings do not all train; tuning.method=lora with "
            "tuning.train=[embeddings, head] would let them"
        )
    prefix = c.tuning.tokens if isinstance(c.tuning, config.Prefix) else 0
    if c.data.max_length + prefix > b.decoder.context:
        log.warn(f"data.max_length={c.data.max_length} is beyond the model's context of {b.decoder.context}")
    if c.distill is None:
        return assemble(c, data, words, b, mesh, steps, row_count)
    t = teacher.draw(c, model_folder(c.distill.teacher), b, words, mesh)
    return assemble(c, teacher.taught(data, t, _digest(t.blueprint)), words, b, mesh, steps, row_count, t)


def _check_qat(c: Config, b: Blueprint) -> None:
    """Raises: UserError: the layers' matrices cannot be rounded as `train.qat` says."""
    if getattr(c.tuning, "dropout", 0.0):
        raise UserError("train.qat rounds adapters with what they stand on, without dropout; set tuning.dropout=0")
    for path, w in jax.tree_util.tree_leaves_with_path(b.plain, is_leaf=is_weight):
        if (name := path_name(path)).startswith("layers_") and name.endswith("_proj/weight"):
            inputs = prod(w.value.shape[w.lead : w.lead + w.n_in])
            check_group(inputs, c.train.qat_inputs, name.split("/")[-2], "train.qat_group=")
    fake_quantized(unbox(b.weights), Scheme(c.train.qat, c.train.qat_inputs))  # says what it is not built for


def assemble(
    c: Config,
    data: Prepared,
    words: Any,
    b: Blueprint,
    mesh: jax.sharding.Mesh,
    steps: int,
    rows: int | None = None,
    taught: Teacher | None = None,
) -> Job:
    """A job from its parts: with the optimiser, and the abstract state in its places."""
    chip, matmuls = chips.of(mesh.devices.flat[0].device_kind), c.train.matmuls
    if chip is not None and matmuls != "same" and chip.rate(matmuls) <= chip.rate("bfloat16"):
        log.warn(f"train.matmuls={matmuls}: {chip.name} multiplies it no faster than bfloat16")
    weights, labels, abstract = b.weights, b.labels, b.abstract
    if taught is not None:
        weights, labels, abstract = taught.weights(weights), taught.labels(labels), taught.abstract(abstract)
    tx = optimiser(c, b.method, weights, labels, steps)
    trainable, frozen = tuning_method.split(abstract, labels)
    shapes = jax.eval_shape(tx.init, trainable)
    where = sharding.optimiser_shardings(tx, trainable, mesh, c.optim.offload)
    scalar = sharding.replicated(mesh)
    state = State(
        trainable,
        frozen,
        jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, where),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=scalar),
        jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=scalar),
    )
    return Job(c, data, words, b, mesh, steps, rows, state, tx, taught)


def trained(job: Job) -> int:
    """Parameters that train at a time."""
    trainable = tuning_method.count(job.state.trainable)
    if tuning_method.CHOSEN not in jax.tree.leaves(job.blueprint.labels):
        return trainable
    labels, shapes = jax.tree.leaves(job.blueprint.labels), jax.tree.leaves(job.blueprint.abstract)
    candidates = sum(x.size for found, x in zip(labels, shapes, strict=True) if found == tuning_method.CHOSEN)
    return trainable - candidates + tuning_method.count(blocks.found(job.state.optimiser).masters)


def parameters(b: Blueprint) -> tuple[int, int]:
    """Parameters of the base, and those that the method added. A quantised base is held as fewer numbers, or more."""
    stripped = tuning_method.count(unbox(tuning_method.strip(b.weights)))
    return tuning_method.count(unbox(b.plain)), tuning_method.count(b.abstract) - stripped


def check_evaluation(c: Config, data: Prepared) -> None:
    """Look for what evaluations need; ask the validation set as `evaluate.task` does, without a model.

    Raises:
      UserError: there is no such metric or task, or nothing that it could ask.
    """
    better(c.evaluate.metric)
    known = ("loss", "perplexity", "accuracy")
    if c.evaluate.task is None and c.objective not in CLASSES and c.evaluate.metric not in known:
        raise UserError(
            f"evaluate.metric {c.evaluate.metric!r} is a task's, and none is asked for; set evaluate.task, or take one "
            f"of {', '.join(known)}"
        )
    for key in ("best", "patience"):
        if getattr(c.evaluate, key) and not data.validation:
            raise UserError(f"evaluate.{key} looks at the validation set, and there is none; set data.validation")
    if c.evaluate.task is None:
        return
    if c.mesh.sizes["stage"] != 1:
        raise UserError(
            "evaluate.task writes answers, which a pipeline of stages cannot; leave it out and run `jaxtune evaluate` "
            "on the export"
        )
    if distributed.count() > 1:
        raise UserError(
            "evaluate.task answers in one process, and there are several; leave it out and run `jaxtune evaluate` on "
            "the export"
        )
    if c.objective in CLASSES:
        raise UserError(f"evaluate.task answers in words, and objective {c.objective} has a head; leave it out")
    task = tasks.named(c.evaluate.task)
    if not data.held:
        raise UserError("evaluate.task answers the validation set, and there is none; set data.validation")
    tasks.questions(task, data.held[: c.evaluate.max_samples], tasks.options_of(c.data))


def optimiser(
    c: Config,
    method: tuning_method.Method,
    weights: Tree,
    labels: Tree,
    steps: int,
    given: Mapping[str, Tree] | None = None,
) -> optax.GradientTransformation:
    """The config's optimiser, as the method shapes it, for abstract `Weight`s; `given` as of `optim.make`."""
    trainable = tuning_method.split(weights, labels)[0]
    tx = method.around(optim.make(c.optim, steps, trainable, method.rates, method.within, given))
    return optim.averaging(tx, c.train.ema)


def vocabulary(c: config.Vocabulary, words: Any, rows: int, place: str) -> int:
    """Add the config's tokens to the tokenizer; how many tokens the model then has, of `rows` before.

    Raises:
      UserError: the tokenizer is larger than the model's table, which is not to grow.
    """
    tokenizer.add(words, c.add, c.special)
    if not (c.grow or c.add or c.special):
        tokenizer.check_size(words, rows, place)
    return max(rows, tokenizer.size(words))


def tokenizer_folder(model: Path, adapter: adapters.Adapter | soft_prompts.SoftPrompts | None) -> Path:
    """Where the tokenizer is: with the adapter, if it brings one, else with the model."""
    brings = adapter is not None and any((adapter.folder / f).exists() for f in tokenizer.FILES)
    return adapter.folder if adapter is not None and brings else model


def _tables_train(b: Blueprint) -> bool:
    tables = [b.labels[name] for name in ("embed_tokens", "lm_head") if name in b.labels]
    return all(found != tuning_method.FROZEN for found in jax.tree.leaves(tables))


def going_on(t: config.Lora) -> adapters.Adapter | None:
    """The adapter to go on from, if there is one.

    Raises:
      UserError: it is of another kind.
    """
    if t.adapter is None:
        return None
    read = soft_prompts.open_adapter(Path(t.adapter))
    if not isinstance(read, adapters.Adapter) or read.kind not in ("LORA", "ADALORA"):
        raise UserError(
            f"tuning.adapter: {read.folder} is of type {read.config['peft_type']}; only LoRA adapters can be gone on "
            "from, so start a fresh one"
        )
    if t.dora and not read.config.get("use_dora"):
        raise UserError(f"tuning.dora: {read.folder} is without magnitudes; leave tuning.dora or tuning.adapter out")
    return read


def make_method(
    tuning_config: config.Tuning, read: adapters.Adapter | None, decoder: Any, training: tuning_method.Training
) -> tuning_method.Method:
    """The config's method; with an adapter to go on from, that adapter's nodes instead of fresh ones.

    Raises:
      UserError: the config's keys do not go together, or do not fit the adapter.
    """
    method = _going_on(tuning_config, read, decoder, training)
    return keeping(method, tuning_config) if getattr(tuning_config, "keep_zeros", False) else method


def _going_on(
    tuning_config: config.Tuning, read: adapters.Adapter | None, decoder: Any, training: tuning_method.Training
) -> tuning_method.Method:
    method = tuning.make(tuning_config, decoder, training)
    if decoder.task is not None:
        method = method._replace(rules=[(f"^{decoder.task.module}/", tuning_method.TRAIN), *method.rules])
    if read is None or not isinstance(tuning_config, config.Lora):
        return method

    dropout = tuning_config.dropout

    def wrap(name: str, w: Any, key: Any) -> Any:
        node = read.wrap(name, w, key)
        return node if node is w else dataclasses.replace(node, dropout=dropout)

    taken = tuning_method.named(tuning_config.train, decoder.tied)
    for name in tuning_method.decoder_names(decoder):
        if read.adapts(name) and any(re.search(p, name) for p in taken):
            raise UserError(
                f"tuning.train matches {name}, which {read.folder} adapts already; narrow tuning.train, or merge the "
                "adapter first and tune the merged model"
            )
    whole = [(f"^{re.escape(n)}$", "train") for n in tuning_method.decoder_names(decoder) if read.trained_whole(n)]
    return method._replace(wrap=wrap, rules=[*whole, *method.rules], made=True, from_base=False)
