"""A model in another form: Hugging Face folders, caches, other dtypes and shards, from whatever a model is found in."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune import blueprint, card, config, job, log, rewrite, sharding, tuned
from jaxtune.errors import UserError, nearest
from jaxtune.hf import adapters, files, foreign, remote, several, smaller
from jaxtune.models import families
from jaxtune.tuning.method import decoder_names

DTYPES: Mapping[str, np.dtype] = {
    "float32": np.dtype("float32"),
    "bfloat16": files.DTYPES["BF16"],
    "float16": np.dtype("float16"),
}
FORMS = ("hf", "orbax")


def write_model(
    source: str,
    target: Path,
    adapter: str | Mapping[str, float] | None = None,
    dtype: str | None = None,
    to: str = "hf",
    shard_bytes: int = files.SHARD_BYTES,
    layers: Sequence[int] | None = None,
) -> None:
    """Write a model as one whole folder, adapters merged; after a kill, the same call goes on where it was.

    Args:
      source: a run, an export, an adapter, a model folder or its cache; llama2.c's `.bin`; a folder of Meta's.
      target: the folder, which appears when it is complete.
      adapter: a PEFT folder to merge into the source; or several, each with the weight of what it adds.
      dtype: float32, bfloat16 or float16; each tensor's own where not given.
      to: "hf", a Hugging Face folder; "orbax", a cache that a big model starts from in seconds.
      shard_bytes: the largest safetensors file.
      layers: those that the model is to have, from 0; all where not given. A student for its teacher, say.

    Raises:
      UserError: the source cannot be opened or holds NaN, has no such layers, or the target exists.
    """
    for option, value, known in (("--dtype", dtype, list(DTYPES)), ("--to", to, list(FORMS))):
        if value is not None and value not in known:
            raise UserError(f"{option} {value!r} is not known{nearest(value, known)}")
    weights: Mapping[str, float] = {adapter: 1.0} if isinstance(adapter, str) else adapter or {}
    s = _open(source, weights, None if dtype is None else DTYPES[dtype])
    if layers is not None:
        s = _of_layers(s, layers)
    sources: list[str | Path] = [source, *weights, *s.folders]
    places = {Path(p).absolute() for p in sources if Path(p).exists()}
    options = [dtype, to, shard_bytes, *sorted(weights.items()), layers]
    about = {"from": [_fingerprint(p, target) for p in sorted(places)], "as": options}
    with files.resumable(target, about) as folder, log.Progress(sum(t.nbytes for t in s.tensors.values())) as bar:
        rewrite.write(folder, s, dtype, to, shard_bytes, bar.add)
        _write_card(folder, target.name, source, weights, s, dtype, layers)


def _of_layers(s: rewrite.Source, layers: Sequence[int]) -> rewrite.Source:
    """The same model of some of its layers."""
    if list(layers) != sorted({*layers}):
        raise UserError(f"--layers {','.join(map(str, layers))}: give rising numbers, each once")
    made = smaller.drop_layers(s.tensors, s.config, layers)
    hf = {**s.config, **made.changes}
    side = {**s.side, "config.json": (json.dumps(hf, indent=2) + "\n").encode()}
    return s._replace(decoder=families.from_hf(hf, "config.json"), config=hf, tensors=made.tensors, side=side)


def write_adapter(base: str, target: Path, weights: Mapping[str, float]) -> None:
    """Write LoRA adapters of one base as one: its product is the weighted sum of theirs, its rank the sum of theirs.

    Args:
      base: the model folder that they were trained on.
      target: the folder, which appears when it is complete.
      weights: PEFT folders, each with the weight of what it adds.

    Raises:
      UserError: no adapter is given, one cannot be added or does not fit the base, or the target exists.
    """
    if not weights:
        raise UserError("no adapter is given to write as one; give --adapter FOLDER=WEIGHT, once or several times")
    read = several.Several(weights)
    mesh = sharding.make_mesh(config.Mesh())
    with jax.set_mesh(mesh):
        b = tuned.draw(job.model_folder(base), read, mesh)
        nodes = blueprint.adapted(b, blueprint.materialise(b, jax.random.key(0), base=False))
    read.check_all_used()
    whole = read.replace(b.stored, b.decoder.family, b.decoder.tied)
    brings = {n: files.Entry(t.shape, t.dtype, t.open) for n, t in whole.items() if t is not b.stored.get(n)}
    known_as = str(Path(base).absolute()) if Path(base).is_dir() else base
    with files.whole(target) as folder:
        files.copy_files(b.folder, folder, files.LICENCE_FILES)
        words = [f for f in files.SIDE_FILES if f not in ("config.json", "generation_config.json")]
        files.copy_files(job.tokenizer_folder(b.folder, read), folder, words)
        adapters.write(folder, nodes, decoder_names(b.decoder), known_as, b.decoder.family, brings)
        given = card.Base(base, b.folder)
        rows = [(Path(p).resolve().name, weight) for p, weight in weights.items()]
        summary = f"LoRA adapters of `{given.shown}`, added up into one."
        sections = [("Merged", card.table([("adapter", "weight"), *rows]))]
        load = card.loading(card.PIPELINES[None], card.has_chat_template(folder), adapter=True)
        made = card.derived(target.name, summary, given, "adapter", sections, tags=["lora", "merged"], load=load)
        card.write(folder, dataclasses.replace(made, library="peft"))


def _write_card(
    folder: Path,
    name: str,
    source: str,
    weights: Mapping[str, float],
    s: rewrite.Source,
    dtype: str | None,
    layers: Sequence[int] | None,
) -> None:
    """The card: of what was merged how, with the training that its own card tells of."""
    base, merged, text = rewrite.origin(source, list(weights), s.folders)
    cast = f", in {dtype}" if dtype else ""
    cast += f", its layers {', '.join(map(str, layers))} alone" if layers is not None else ""
    if merged:
        rows = [(Path(p).resolve().name, weights.get(p, 1.0)) for p in merged]
        sections = [("Merged", card.table([("adapter", "weight"), *rows]))]
        summary = f"`{base.shown}` with {'adapters' if len(rows) > 1 else 'an adapter'} merged into its weights{cast}."
        relation: Any = "merge" if len(rows) > 1 else "finetune"
    else:
        sections, summary, relation = [], f"`{base.shown}` in another form{cast}.", None
    head = s.decoder.task
    load = card.loading(card.PIPELINES[head.kind if head else None], card.has_chat_template(folder))
    tags = ["merged"] if merged else []
    card.write(folder, card.derived(name, summary, base, relation, sections, text, tags, load))


def _open(source: str, weights: Mapping[str, float], dtype: np.dtype | None) -> rewrite.Source:
    path = Path(source)
    llama2c = path.is_file() and path.suffix == ".bin"
    if llama2c or (not (path / "config.json").exists() and any(path.glob("consolidated.*.pth"))):
        if weights:
            raise UserError(
                f"{source}: adapters go into model folders; make one of it first, `jaxtune convert {source} DST`"
            )
        return _foreign((foreign.open_llama2c if llama2c else foreign.open_meta)(path), dtype, source)
    mesh = sharding.make_mesh(config.Mesh())
    with jax.set_mesh(mesh):
        opened = tuned.open_weights(source, weights or None, None, mesh, base=False)
    return rewrite.of(opened, ", ".join(weights) or source, dtype)


def _foreign(found: foreign.Foreign, dtype: np.dtype | None, place: str) -> rewrite.Source:
    tensors = found.tensors
    if dtype is not None:
        tensors = {n: _cast(t, dtype) for n, t in tensors.items()}
    return rewrite.Source(families.from_hf(found.config, place), found.config, tensors, (), found.side)


def _cast(entry: files.Entry, dtype: np.dtype) -> files.Entry:
    def data() -> np.ndarray:
        with np.errstate(over="ignore"):  # what becomes infinite is refused when it is written
            return entry.data().astype(dtype)

    return files.Entry(entry.shape, dtype, data)


def _fingerprint(path: Path, target: Path) -> list[Any]:
    """What a source was when it was opened: its files, their sizes and times; of a remote one, what its store says."""
    if (mark := path / remote.MARK).exists():
        return [str(path), mark.read_text()]
    found = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    half = files.partial(target).absolute()
    stats = [(f, f.stat()) for f in found if not f.is_relative_to(half)]
    return [str(path), [[f.name, s.st_size, s.st_mtime_ns] for f, s in stats]]
