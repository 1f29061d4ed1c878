"""The composition root: a config becomes model, weights, method, objective, data and step. It alone knows everybody.

`train` is what both the command line and notebooks call; the other functions open what it leaves behind.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import blueprint, config, evaluate, log, optim, sharding, tuning
from jaxtune.blueprint import Blueprint
from jaxtune.checkpoint import Checkpoints, start_step
from jaxtune.config import DEMO, Config
from jaxtune.data import encode, pipeline
from jaxtune.data.pipeline import Batch, Batches, Prepared, Rows
from jaxtune.errors import Interrupted, UserError
from jaxtune.hf import adapters, files, tokenizer
from jaxtune.layers import unbox
from jaxtune.objectives import OBJECTIVES
from jaxtune.training import Every, Hooks, State, loop, make_step
from jaxtune.tuning import method as tuning_method

Tree = Any
EXPORT, CHECKPOINTS, CONFIG = "export", "checkpoints", "config.yaml"
DEMO_FOLDER = Path(__file__).parent / "demo"


# --- where things are -----------------------------------------------------------------------------------------------


def model_folder(name: str) -> Path:
    """The folder of a model: the demo's, a local one, or a snapshot of a hub repository.

    Raises:
      UserError: there is no such folder, and it is not a hub id that can be had.
    """
    if name == DEMO:
        return DEMO_FOLDER / "model"
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise UserError(f"model {name}: no such folder")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [*files.SIDE_FILES, *files.LICENCE_FILES, "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
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


# --- training -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """A run before its weights are read."""

    config: Config
    data: Prepared
    tokenizer: Any
    blueprint: Blueprint
    mesh: jax.sharding.Mesh
    steps: int
    state: State  # abstract, with shardings
    tx: Any

    @property
    def about(self) -> dict[str, Any]:
        """What a checkpoint remembers of its run."""
        held = self.data.validation
        return {
            "config": self.config.model_dump(mode="json"),
            "steps": self.steps,
            "data_digest": self.data.train.digest(),
            "validation_digest": held.digest() if held else None,
            "model_digest": _digest(self.blueprint),
            "versions": {p: importlib.metadata.version(p) for p in ("jax", "flax", "optax", "orbax-checkpoint")},
        }


def _digest(b: Blueprint) -> str:
    """Of the base model: its config, and the sizes and names of its tensors."""
    import hashlib

    h = hashlib.blake2b((b.folder / "config.json").read_bytes(), digest_size=16)
    for name, ts in sorted(b.tensors.items()):
        h.update(f"{name} {[(t.dtype.name, t.shape) for t in ts]}".encode())
        h.update(ts[0].open().reshape(-1)[:4096].tobytes())
    return h.hexdigest()


def prepare(c: Config) -> Job:
    """Everything of a run that needs no weights: data, shapes, shardings, the optimiser's shapes.

    Raises:
      UserError: something of the config, the files or the data does not fit.
    """
    folder = model_folder(c.model)
    blueprint.read_config(folder)  # the most likely mistake first
    words = tokenizer.load(folder)
    data = pipeline.prepare(data_with_demo(c.data), words, c.train.seed, c.objective)
    mesh = sharding.make_mesh(c.mesh)
    b = blueprint.draw(folder, lambda d: tuning.make(c.tuning, d), mesh, c.train.compute_dtype, c.train.remat)
    _check_vocabulary(data.train, b.decoder.vocab)
    if c.data.max_length > b.decoder.rope.context and b.decoder.rope.kind == "default":
        log.warn(f"data.max_length={c.data.max_length} is beyond the model's context of {b.decoder.rope.context}")
    steps = pipeline.total_steps(len(data.train), c.train.batch_size, c.train.epochs, c.train.steps)
    tx = optim.make(c.optim, steps)
    trainable, frozen = tuning_method.split(b.abstract, b.labels)
    shapes = jax.eval_shape(tx.init, trainable)
    where = sharding.optimiser_shardings(tx, trainable, mesh)
    scalar = sharding.replicated(mesh)
    state = State(
        trainable,
        frozen,
        jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, where),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=scalar),
        jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=scalar),
    )
    return Job(c, data, words, b, mesh, steps, state, tx)


def _check_vocabulary(rows: Rows, vocab: int) -> None:
    if (largest := max(int(e.ids.max()) for e in rows.examples)) >= vocab:
        raise UserError(
            f"the tokenizer gives id {largest}, the model has {vocab} embeddings; they do not belong together"
        )


def putter(mesh: jax.sharding.Mesh, micro: int | None) -> Callable[[Batch], Mapping[str, Any]]:
    """How a batch goes onto the mesh: `[A, B, T]` for `micro` micro-batches, `[B, T]` for None.

    Rows are added, empty ones, where B does not divide over the mesh.
    """
    shards = sharding.batch_shards(mesh)
    where = sharding.batch_sharding(mesh, lead=0 if micro is None else 1)

    def put(batch: Batch) -> Mapping[str, Any]:
        out = {}
        for name, x_RT in batch.columns.items():
            x_ABT = x_RT.reshape(micro or 1, -1, x_RT.shape[-1])
            x_ABT = np.pad(x_ABT, ((0, 0), (0, -x_ABT.shape[1] % shards), (0, 0)))
            out[name] = jax.make_array_from_process_local_data(where, x_ABT if micro else x_ABT[0])
        return out

    return put


def compile_step(job: Job) -> Any:
    """The very step that trains, compiled from shapes."""
    c = job.config
    step = make_step(apply_of(job.blueprint), OBJECTIVES[c.objective], job.tx)
    rows = c.train.batch_size // c.train.accumulation
    rows += -rows % sharding.batch_shards(job.mesh)
    shape = c.train.accumulation, rows, job.data.train.length
    where = sharding.batch_sharding(job.mesh, lead=1)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where) for name in pipeline.COLUMNS}
    out = jax.tree.map(lambda s: s.sharding, job.state), sharding.replicated(job.mesh)
    with jax.set_mesh(job.mesh):
        return jax.jit(step, donate_argnums=0, out_shardings=out).lower(job.state, batch).compile()


def apply_of(b: Blueprint) -> Callable[[Tree, Mapping[str, Any]], Any]:
    """The model as a function of weights and batch."""

    def apply(weights: Tree, batch: Mapping[str, Any]) -> Any:
        return b.model.apply({"params": weights}, batch["ids_BT"], batch["segment_BT"], batch["position_BT"])[0]

    return apply


def train(c: Config) -> Path:
    """Train as the config says, or go on where the run folder stands, and export. Returns the run folder.

    Raises:
      UserError: something does not fit; nothing whole is replaced.
      Interrupted: told to stop; saved, to be called again.
    """
    use_compile_cache()
    out = Path(c.output)
    job = prepare(c)
    micro = c.train.batch_size // c.train.accumulation
    if odd := micro % (shards := sharding.batch_shards(job.mesh)):
        log.warn(
            f"{micro} sequences do not divide over {shards} parts of the batch: {shards - odd} empty ones are added"
        )
    checkpoints = Checkpoints(out / CHECKPOINTS, c.checkpoint.keep)
    about = job.about
    start = start_step(c, checkpoints, about)
    if start == job.steps and (out / EXPORT).exists():
        log.say(f"{out}: finished already at step {start}; its result is in {out / EXPORT}")
        checkpoints.close()
        return out
    (out / CONFIG).write_text(config.dump(c))
    with ThreadPoolExecutor(1) as pool, jax.set_mesh(job.mesh):
        compiling = pool.submit(compile_step, job)
        boxes = blueprint.materialise(job.blueprint, jax.random.key(c.train.seed))
        compiled = compiling.result()
        trainable, frozen = tuning_method.split(unbox(boxes), job.blueprint.labels)
        del boxes
        batches = Batches(
            job.data.train,
            c.train.batch_size,
            seed=c.train.seed,
            row_count=c.train.batch_size * job.steps if c.train.steps else round(len(job.data.train) * c.train.epochs),
            shard=(jax.process_index(), jax.process_count()),
        )
        if start:
            like = State(trainable, frozen, *job.state[2:])
            restored, position = checkpoints.restore(start, like._replace(trainable=job.state.trainable).saved())
            state, batches.state = State(frozen=frozen, **restored), position
            log.say(f"{out}: goes on after step {start}")
        else:
            where = jax.tree.map(lambda s: s.sharding, job.state.optimiser)
            optimiser = jax.jit(job.tx.init, out_shardings=where)(trainable)
            key = jax.random.key_data(jax.random.key(c.train.seed + 1))
            zero, key = jax.device_put((jnp.int32(0), key), sharding.replicated(job.mesh))
            state = State(trainable, frozen, optimiser, zero, key)
        del trainable, frozen
        introduce(job, compiled)
        try:
            state = _loop(job, state, compiled, batches, checkpoints, start, about)
        finally:
            checkpoints.close()  # what was being saved is saved, also when the loop ends with an error
        export(job, state)
    return out


def _loop(
    job: Job, state: State, compiled: Any, batches: Batches, checkpoints: Checkpoints, start: int, about: dict
) -> State:
    """The loop with its log, evaluations, checkpoints and signals."""
    c, held = job.config, job.data.validation
    runlog = log.RunLog(Path(c.output), start, job.steps)
    rate = optim.schedule(c.optim, job.steps)
    sums = jax.jit(evaluate.make_sums(apply_of(job.blueprint), OBJECTIVES[c.objective]))
    eval_batch = c.evaluate.batch_size or c.train.batch_size // c.train.accumulation

    def on_log(n: int, values: dict[str, float], batch: Batch) -> None:
        write = n % c.train.log_every == 0 or n in (1, job.steps)
        learning_rate = float(rate(n - 1)) if write else 0.0
        runlog.step(n, {**values, "learning_rate": learning_rate}, batch.tokens, write)

    def on_evaluate(n: int, state: State) -> None:
        if held is not None:
            weights = tuning_method.join(state.trainable, state.frozen)
            runlog.evaluation(n, evaluate.scores(sums, weights, held, eval_batch, putter(job.mesh, None)))

    def on_save(n: int, state: State) -> None:
        checkpoints.save(n, state.saved(), batches.state, about)

    with _told_to_stop() as told, contextlib.closing(runlog):
        if not start:
            on_evaluate(0, state)
        hooks = Hooks(on_log, on_evaluate, on_save, told.is_set)
        every = Every(c.evaluate.every, c.checkpoint.every)
        put = putter(job.mesh, c.train.accumulation)
        state, n = loop(
            state,
            compiled,
            batches,
            put,
            start,
            job.steps,
            every,
            hooks,
            lambda b: job.data.train.where(b.rows.tolist()),
        )
        if told.is_set() and n < job.steps:
            checkpoints.wait()
            raise Interrupted(f"{c.output}: stopped after step {n} and saved; run the same command again to go on")
        runlog.summary()
    return state


@contextlib.contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set an event while this is open; a second Ctrl-C interrupts at once."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def handler(number: int, frame: Any) -> None:
        if told.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        told.set()
        log.warn(f"{signal.Signals(number).name}: saves after this step and leaves")

    old = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for s, h in old.items():
            signal.signal(s, h)


def introduce(job: Job, compiled: Any) -> None:
    """Say what is about to happen: one training sample, and the numbers of the run."""
    c, data, b = job.config, job.data, job.blueprint
    for remark in data.remarks:
        log.say(remark)
    first = data.train.examples[data.train.rows[0][0]]
    mask = np.ones_like(first.mask) if c.objective == "pretrain" else first.mask
    log.sample(encode.visible(job.tokenizer, first.ids, mask))
    trains, all_ = tuning_method.count(job.state.trainable), tuning_method.count(b.abstract)
    filled = data.train.tokens / (len(data.train) * data.train.length)
    per_device = compiled.memory_analysis()
    memory = "not known here"
    if per_device is not None:
        state, rest = per_device.argument_size_in_bytes, per_device.temp_size_in_bytes
        memory = f"{log.size(state + rest)} per device ({log.size(state)} state and batch, {log.size(rest)} temporary)"
    axes = ", ".join(f"{a} {n}" for a, n in job.mesh.shape.items())
    log.table(
        [
            ("model", f"{c.model if c.model == DEMO else b.folder.name}: {all_ - _adapters(b):,} parameters"),
            ("tuning", f"{c.tuning.method}: {trains:,} of {all_:,} train ({100 * trains / all_:.2f} %)"),
            ("layers", f"{b.decoder.layers} in groups of {', '.join(map(str, b.decoder.groups))}, "
                       f"remat {c.train.remat}"),
            ("data", f"{len(data.train.examples):,} examples, {data.train.tokens:,} tokens, "
                     f"{data.train.trained_tokens:,} of them trained on"),
            ("rows", f"{len(data.train):,} of {data.train.length} tokens, {100 * filled:.0f} % full"
                     + (f"; validation {len(data.validation)}" if data.validation else "; no validation")),
            ("steps", f"{job.steps:,} of {c.train.batch_size} rows"
                      + (f" in {c.train.accumulation} micro-batches" if c.train.accumulation > 1 else "")),
            ("mesh", f"{axes} on {job.mesh.size} × {job.mesh.devices.flat[0].device_kind}"),
            ("compute", c.train.compute_dtype),
            ("memory", memory),
        ]
    )  # fmt: skip


def _adapters(b: Blueprint) -> int:
    """Parameters that the method added."""
    return tuning_method.count(b.abstract) - tuning_method.count(unbox(tuning_method.strip(b.weights)))


def validate(c: Config) -> list[tuple[str, str]]:
    """What can be checked without weights: config, files, columns, token lengths, memory, disk; as names and values.

    Raises:
      UserError: something does not fit.
    """
    job = prepare(c)
    b, data = job.blueprint, job.data
    lengths = np.array([len(e.ids) for e in data.train.examples])

    def held(tree: Tree) -> int:
        return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    saved = held(job.state.saved())
    exported = (
        saved
        if isinstance(c.tuning, config.Lora)
        else sum(int(np.prod(t.shape)) * t.dtype.itemsize for ts in b.tensors.values() for t in ts)
    )
    need = saved * (c.checkpoint.keep + 1) + exported
    out = Path(c.output).absolute()
    free = shutil.disk_usage(next(p for p in (out, *out.parents) if p.exists())).free
    if need > free:
        raise UserError(f"{out}: checkpoints and export need {log.size(need)}, {log.size(free)} are free; make room")
    gradients = held(job.state.trainable)
    return [
        *[("remark", r) for r in data.remarks],
        ("model", f"{b.folder}: {tuning_method.count(unbox(tuning_method.strip(b.weights))):,} parameters, "
                  "all tensors fit"),
        ("tuning", f"{c.tuning.method}: {tuning_method.count(job.state.trainable):,} parameters train"),
        ("data", f"{len(lengths):,} examples of {lengths.min()} to {lengths.max()} tokens, "
                 f"median {np.median(lengths):.0f}"),
        ("rows", f"{len(data.train):,} of {data.train.length} tokens"
                 + (f"; validation {len(data.validation):,}" if data.validation else "")),
        ("steps", f"{job.steps:,}"),
        ("memory", f"{log.size(held(job.state) + gradients)} for weights, optimiser and gradients over all devices; "
                   "activations come on top"),
        ("disk", f"{log.size(need)} for {c.checkpoint.keep + 1} checkpoints and the export; {log.size(free)} free"),
    ]  # fmt: skip


# --- results --------------------------------------------------------------------------------------------------------


def export(job: Job, state: State) -> Path:
    """Write `export/`: a PEFT adapter after LoRA, else a whole Hugging Face folder. It appears when it is complete."""
    target = Path(job.config.output) / EXPORT
    weights = blueprint.boxed(job.blueprint, tuning_method.join(state.trainable, state.frozen))
    write_export(target, job.blueprint, weights, job.config, job.data.template)
    (target.parent / "README.md").write_text(_card(job, target))
    log.say(f"exported to {target}")
    return target


def write_export(
    target: Path, b: Blueprint, weights: Tree, c: Config, template: str | None, whole: bool = False
) -> None:
    """The tuned model as a folder: an adapter where the method is LoRA and `whole` is not asked for."""
    with files.whole(target, replace=True) as folder:
        files.copy_files(b.folder, folder, files.LICENCE_FILES)
        if isinstance(c.tuning, config.Lora) and not whole:
            t = c.tuning
            base = c.model if c.model == DEMO else os.path.abspath(c.model) if Path(c.model).is_dir() else c.model
            adapters.write(folder, weights, base, t.rank, t.alpha, t.dropout, t.rslora)
            files.copy_files(
                b.folder, folder, [f for f in files.SIDE_FILES if f not in ("config.json", "generation_config.json")]
            )
        else:
            files.copy_files(b.folder, folder, files.SIDE_FILES)
            files.write_folder(folder, blueprint.full_tensors(b, weights))
        if template and tokenizer.load(folder).chat_template is None:
            (folder / "chat_template.jinja").write_text(template)


def _card(job: Job, target: Path) -> str:
    """The model card: what was trained, on what, how, and how to load it."""
    c = job.config
    metrics = log.read_metrics(Path(c.output) / "metrics.jsonl")
    held = [m for m in metrics if "eval_loss" in m]
    scores = (
        f"Validation loss {held[0]['eval_loss']:.4f} before and {held[-1]['eval_loss']:.4f} after, token accuracy "
        f"{held[0]['eval_accuracy']:.4f} and {held[-1]['eval_accuracy']:.4f}.\n\n"
        if held
        else ""
    )
    sources = "\n".join(f"- `{Path(s.path).name}`" for s in data_with_demo(c.data).sources)
    versions = ", ".join(f"{k} {v}" for k, v in job.about["versions"].items())
    return (
        f"---\nbase_model: {c.model}\nlibrary_name: {'peft' if isinstance(c.tuning, config.Lora) else 'transformers'}\n"
        f"---\n\n# {Path(c.output).name}\n\n`{c.model}` tuned with jaxtune ({c.tuning.method}, "
        f"objective {c.objective}).\n\n"
        f"{scores}![loss](loss.png)\n\n## Data\n\n{sources}\n\n{job.data.train.tokens:,} tokens, "
        f"{job.data.train.trained_tokens:,} of them trained on; digest `{job.data.train.digest()}`.\n\n"
        f"## Training\n\n{job.steps} steps of {c.train.batch_size} rows of {job.data.train.length} tokens on "
        f"{job.mesh.size} × {job.mesh.devices.flat[0].device_kind}; {versions}. All settings are in `{CONFIG}`.\n\n"
        f"## Use\n\n```\njaxtune chat {target}\n```\n"
    )
