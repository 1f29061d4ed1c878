"""A model opened to be compressed, rows to calibrate and to measure it with, and the folder that is written of it.

Dimensions: B batch, T time.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune import __version__, config, job, log, rewrite, sharding, tasks, tuned
from jaxtune import card as model_card
from jaxtune.data import pipeline
from jaxtune.data.pipeline import Batches, Rows
from jaxtune.errors import UserError
from jaxtune.hf import files, layout
from jaxtune.layers import is_weight
from jaxtune.models import families
from jaxtune.rewrite import Source
from jaxtune.tuned import Tuned
from jaxtune.tuning import method
from jaxtune.weights import path_name

Tree = Any


class Opened(NamedTuple):
    """A model to be compressed: `model` holds plain arrays, adapters merged; `source` is what its files hold."""

    name: str  # as it was asked for
    model: Tuned
    source: Source

    @property
    def weights(self) -> Tree:
        """The arrays, as `calibrate.through` and `Tuned.scores` take them."""
        return self.model.weights

    def scores(self, rows: Rows, weights: Tree = None, batch_size: int = 8) -> dict[str, float]:
        """Loss, perplexity and accuracy on all tokens of rows, of its weights or of others of the same form."""
        return self.model.scores(rows, batch_size, "pretrain", weights)


def open_for(source: str, adapter: str | None = None, dtype: str = "float32") -> Opened:
    """Open a run, an export, an adapter or a model folder; `dtype` is what is computed in, not what is written.

    Raises:
      UserError: it cannot be opened, or has a head instead of a language model's.
    """
    job.use_compile_cache()
    mesh = sharding.make_mesh(config.Mesh())
    with jax.set_mesh(mesh):
        found = tuned.open_weights(source, adapter, dtype, mesh)
        if (head := found.blueprint.decoder.task) is not None:
            raise UserError(f"{source}: has a head for {head.kind}; only language models are compressed")
        written = rewrite.of(found, adapter or source)
        model = tuned.ready(found, mesh)
        return Opened(source, dataclasses.replace(model, weights=method.merge(model.weights)), written)


def rows_for(opened: Opened, data: str | None, n: int | None = None, length: int = 2048, seed: int = 0) -> Rows:
    """Packed rows of a data file, or of what a run was trained on: `n` of them drawn by the seed, or all.

    Args:
      opened: whose tokenizer, template and context hold.
      data: a file of any kind that can be trained on; where it is None, what the run was trained on, or the
        embedded demo's for the demo.
      n: how many rows; None is all.
      length: T, at most the model's context.
      seed: of the draw.

    Raises:
      UserError: no data is given, or none is in the file.
    """
    length, split, run = min(length, opened.model.blueprint.decoder.context), seed, Path(opened.name) / job.CONFIG
    if data is None and run.exists():  # without what the run held out
        section, split, path = (c := config.load(run)).data, c.train.seed, f"{opened.name}, its data"
    elif data is None and opened.name != config.DEMO:
        raise UserError("no data is given to calibrate with; give --data FILE, a few hundred rows like those it is for")
    else:
        path = str(job.DEMO_FOLDER / "train.jsonl") if data in (None, config.DEMO) else str(data)
        section = config.Data(train=path)
    section = job.data_with_demo(section).model_copy(update={"max_length": length, "packing": True})
    prepared = pipeline.prepare(section, opened.model.tokenizer, split, "pretrain", ask=tasks.asking(section))
    for remark in prepared.remarks:
        log.say(remark.replace("train:", f"{path}:"))
    rows = prepared.rows
    if n is None or n >= len(rows):
        if n is not None and n > len(rows):
            log.warn(f"{path}: has {len(rows)} rows of {length} tokens, {n} were asked for; takes all")
        return rows
    drawn = np.sort(np.random.default_rng(seed).permutation(len(rows))[:n])
    kept, places = [rows.rows[i] for i in drawn], iter(range(len(rows.examples)))
    return Rows(
        [rows.examples[k] for row in kept for k in row],
        [rows.origins[k] for row in kept for k in row],
        [[next(places) for _ in row] for row in kept],
        rows.length,
    )


def batches(rows: Rows, batch_size: int = 8) -> list[Mapping[str, Any]]:
    """Rows as batches of columns `[B, T]`, for `calibrate.through`; the last is filled up with empty rows."""
    size = min(batch_size, len(rows))
    return [b.columns for b in Batches(rows, size, seed=None, row_count=len(rows))]


def tensors(opened: Opened, weights: Tree) -> dict[str, files.Entry]:
    """The model's tensors with the changes that weights of the same form have; in the dtypes of its files.

    What did not change comes out as the files have it, bit by bit, whatever was computed in.
    """
    out = dict(opened.source.tensors)
    b = opened.model.blueprint
    old, new = ({path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(t)} for t in (opened.weights, weights))
    for path, w in jax.tree_util.tree_leaves_with_path(b.plain, is_leaf=is_weight):
        name = path_name(path)
        if new[name] is old[name]:
            continue
        was, now = w.like(old[name]), w.like(new[name])
        for hf_name, at in zip(layout.hf_names(name, w, b.decoder.family), layout.places(w), strict=True):

            def data(
                was: Any = was,
                now: Any = now,
                at: dict[str, int] = at,
                stored: files.Entry = opened.source.tensors[hf_name],
            ) -> np.ndarray:
                a, b = (layout.to_hf(np.asarray(layout.pick(x, at)), x)[: stored.shape[0]] for x in (was, now))
                with np.errstate(over="ignore"):  # what becomes infinite is refused when it is written
                    return np.where((a == b) & (b != 0), stored.data(), b.astype(stored.dtype))

            out[hf_name] = out[hf_name]._replace(data=data)
    return out


def write(
    target: Path,
    opened: Opened,
    entries: Mapping[str, files.Entry],
    changes: Mapping[str, Any] | None = None,
    side: Mapping[str, bytes] | None = None,
    card: str = "",
) -> None:
    """Write a changed model as a Hugging Face folder, which appears when it is complete.

    Args:
      target: the folder.
      opened: the model that it was made of; its tokenizer, licence and other files are copied.
      entries: the tensors, by their Hugging Face names.
      changes: keys of config.json that are not as they were; None takes a key out.
      side: further files, such as a report.
      card: what was done, in Markdown, for the model card.

    Raises:
      UserError: the target exists, the disk is full, or a tensor holds NaN or infinity.
    """
    s, given = opened.source, changes or {}
    hf = {k: v for k, v in {**s.config, **given}.items() if v is not None or k not in given}
    decoder = families.from_hf({k: v for k, v in hf.items() if k != "quantization_config"}, str(target / "config.json"))
    decoder = dataclasses.replace(decoder, vocab=s.decoder.vocab)
    made = {**s.side, **(side or {}), model_card.FILE: _card(target, opened, card, hf).encode()}
    if hf != s.config:
        made["config.json"] = (json.dumps(hf, indent=2) + "\n").encode()
    source = s._replace(config=hf, decoder=decoder, tensors=entries, side=made)
    with files.whole(target) as folder:
        rewrite.write(folder, source)


def _card(target: Path, opened: Opened, text: str, hf: Mapping[str, Any]) -> str:
    base, merged, own = rewrite.origin(opened.name, [], opened.source.folders)
    quantised = "quantization_config" in hf
    load = model_card.loading(model_card.PIPELINES[None], opened.model.template is not None)
    made = model_card.derived(
        target.name,
        f"`{base.shown}`{', tuned,' if merged else ','} compressed with jaxtune {__version__}.",
        base,
        "quantized" if quantised else "finetune",
        [("Compressed", text.strip())],
        own,
        ["compressed"],
        load[1:] if quantised else load,  # whether transformers opens it depends on its packages
    )
    return model_card.render(made)
