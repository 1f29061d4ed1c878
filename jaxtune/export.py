"""What a run hands back: an adapter or a whole Hugging Face folder, and its model card."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtune import blueprint, card, config, distributed, environment, log
from jaxtune.best import best_step
from jaxtune.blueprint import Blueprint
from jaxtune.config import DEMO, Config
from jaxtune.data.reading import hub
from jaxtune.data.streaming import Stream
from jaxtune.errors import UserError
from jaxtune.hf import adapters, files, layout, load, quantized, soft_prompts, tokenizer
from jaxtune.job import EXPORT, EXPORTS, Job, parameters, trained
from jaxtune.layers import is_weight, plain_names
from jaxtune.models import heads
from jaxtune.nodes import soft_prompt
from jaxtune.nodes.grid import Scheme
from jaxtune.tuning import adalora
from jaxtune.tuning import method as tuning_method
from jaxtune.tuning.zeros import maskable
from jaxtune.weights import path_name

Tree = Any
_LISTED = 50  # files of data in a card


def export(job: Job, weights: Tree) -> Path:
    """Write `export/`: a PEFT adapter after LoRA, else a whole Hugging Face folder. It appears when it is complete.

    The first process writes for all; see `distributed.gathered`.
    """
    target = Path(job.config.output) / EXPORT
    if not distributed.first():
        return target
    boxed = blueprint.boxed(job.blueprint, weights)
    write_export(target, job.blueprint, boxed, job.config, job.data.template, lambda f: run_card(job, f))
    text = (target / card.FILE).read_text(encoding="utf-8")
    log.write_whole(target.parent / card.FILE, text.replace('folder = "."', f'folder = "{EXPORT}"'))
    log.say(f"exported to {target}")
    return target


def export_step(job: Job, weights: Tree, n: int) -> None:
    """Write `exports/step-n`, the same of step `n`, and remove the oldest beyond `checkpoint.keep`.

    A disk that cannot be written is told and does not end the run.
    """
    folder = Path(job.config.output) / EXPORTS
    if not distributed.first():
        return
    boxed = blueprint.boxed(job.blueprint, weights)
    try:
        write_export(
            folder / f"step-{n}", job.blueprint, boxed, job.config, job.data.template, lambda f: run_card(job, f, n)
        )
        there = sorted((f for f in folder.glob("step-*")), key=lambda f: int(f.name.removeprefix("step-")))
        for old in [f for f in there if int(f.name.removeprefix("step-")) <= n][: -job.config.checkpoint.keep]:
            shutil.rmtree(old)
    except (OSError, UserError) as e:
        log.warn(f"{folder / f'step-{n}'}: is not exported ({' '.join(str(e).split())}); training goes on")


def write_export(
    target: Path,
    b: Blueprint,
    weights: Tree,
    c: Config,
    template: str | None,
    made: Callable[[Path], card.Card] | None = None,
    whole: bool = False,
) -> None:
    """The tuned model as a folder: an adapter where the method is LoRA and `whole` is not asked for. `made` gives the
    card of what is written."""
    zeros = getattr(c.tuning, "keep_zeros", False)
    with files.whole(target, replace=True) as folder:
        files.copy_files(b.folder, folder, files.LICENCE_FILES)
        if isinstance(c.tuning, config.Adapter) and not whole and not zeros:
            t = c.tuning
            base = os.path.abspath(b.folder) if c.model == DEMO or Path(c.model).is_dir() else c.model
            brings = blueprint.full_tensors(b, weights, only_whole=True)
            dropout, rslora = getattr(t, "dropout", 0.0), getattr(t, "rslora", False)
            names = tuning_method.decoder_names(b.decoder)
            nodes = adalora.as_lora(blueprint.adapted(b, weights))
            if (prompt := soft_prompt.of(weights)) is not None:
                soft_prompts.write(folder, prompt, base, b.decoder)
            else:
                adapters.write(folder, nodes, names, base, b.decoder.family, brings, dropout, rslora, b.decoder.task)
            words = [f for f in files.SIDE_FILES if f not in ("config.json", "generation_config.json")]
            files.copy_files(b.folder, folder, words)
            if isinstance(t, config.Lora) and t.adapter is not None:
                files.copy_files(Path(t.adapter), folder, words)
            if heads.to_hf(b.decoder.task, hf := blueprint.dense_config(b.folder), b.decoder.family):  # another head
                blueprint.write_config(folder, hf, b.decoder)
        else:
            files.copy_files(b.folder, folder, files.SIDE_FILES)
            tensors = blueprint.full_tensors(b, weights)
            if c.train.qat != "none":
                tensors = quantized.on_grid(tensors, Scheme(c.train.qat, c.train.qat_inputs))
            files.write_folder(folder, tensors)
            blueprint.write_config(folder, blueprint.dense_config(b.folder), b.decoder)
        if zeros:
            _check_zeros(folder, b)
        if c.vocabulary.add or c.vocabulary.special:
            grown = tokenizer.load(folder)
            tokenizer.add(grown, c.vocabulary.add, c.vocabulary.special)
            grown.save_pretrained(folder)
        if template and tokenizer.load(folder).chat_template != template:
            (folder / "chat_template.jinja").write_text(template)
        if made is not None:
            card.write(folder, made(folder))


def _check_zeros(folder: Path, b: Blueprint) -> None:
    """Look for the base's zeros in what was written, and tell how many there are.

    Raises:
      UserError: some are gone.
    """
    written, zeros, total = load.read_folder(folder), 0, 0
    for path, w in jax.tree_util.tree_leaves_with_path(b.plain, is_leaf=is_weight):
        if not maskable(plain_names(path_name(path))[0], w):
            continue
        for name, base in zip(
            layout.hf_names(path_name(path), w, b.decoder.family), b.tensors[path_name(path)], strict=True
        ):
            was, now = base.open() == 0, written[name].open() == 0
            if lost := int((was & ~now).sum()):
                raise UserError(
                    f"{name}: {lost} weights that are zero in {b.folder} are not in the export, against "
                    "tuning.keep_zeros; nothing was written"
                )
            zeros, total = zeros + int(now.sum()), total + now.size
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    log.say(f"zeros are kept: {100 * zeros / max(total, 1):.1f} % of the layers' matrices; {log.size(size)}")


def run_card(job: Job, folder: Path, step: int | None = None) -> card.Card:
    """The model card of a run: what was trained, on what, how, and how to load the folder.

    Args:
      job: the run.
      folder: its export, which is written but for the card.
      step: that the export is of; the last, or the best, where not given.
    """
    c, decoder = job.config, job.blueprint.decoder
    base = card.Base(c.model, job.blueprint.folder)
    entries = log.read_metrics(Path(c.output) / "metrics.jsonl")
    held = [m for m in entries if "eval_loss" in m]
    at = step if step is not None else best_step(c.evaluate, entries) if c.evaluate.best else None
    after = next((m for m in reversed(held) if at is None or m["step"] == at), None)
    scores = {k[5:]: v for k, v in after.items() if k.startswith("eval_")} if after else {}
    try:
        log.plot(entries, folder / card.PLOT)
    except OSError as e:
        log.warn(f"{folder / card.PLOT}: cannot be drawn ({e.strerror or e}); the card is without it")
    adapter, head = (folder / adapters.CONFIG).exists(), decoder.task
    pipeline = card.PIPELINES[head.kind if head else None]
    used, aside = (list(counted) for counted in _files(job))
    load = card.loading(pipeline, job.data.template is not None, adapter, head.size if head else None)
    if head is not None and (not head.opens_in_transformers(decoder.family) or (adapter and head.kind == "span_qa")):
        load = load[1:]  # merged, where transformers has the class at all
    method = c.tuning.method
    base_parameters, added = parameters(job.blueprint)
    trains = trained(job)
    summary = (
        f"`{base.shown}` tuned by {method} with objective {c.objective}: {trains:,} of {base_parameters + added:,} "
        f"parameters trained ({100 * trains / (base_parameters + added):.2f} %)."
    )
    if head is not None and head.labels:
        summary += (
            f" Its head is for {head.kind}: {', '.join(head.labels[:20])}{' …' if len(head.labels) > 20 else ''}."
        )
    sections = [("Data", _data(job)), ("Training", _training(job, entries, at))]
    if after:
        rows = [(k, f"{held[0][f'eval_{k}']:.4f}" if f"eval_{k}" in held[0] else "", f"{v:.4f}")
                for k, v in scores.items()]  # fmt: skip
        sections.insert(0, ("Scores", card.table([("validation", "before", "after"), *rows])))
    sections += [("Settings", _settings(c)), ("Versions", _versions(job))]
    return card.Card(
        name=Path(c.output).resolve().name,
        summary=summary,
        base=base,
        relation="adapter" if adapter else "finetune",
        library="peft" if adapter else "transformers",
        pipeline=pipeline,
        tags=list(dict.fromkeys((method, c.objective))),
        datasets=sorted({hub.parts(place)[0] for place in used if hub.is_hub(place)}),
        scores=scores,
        scored_on=", ".join(Path(p).name if p not in used else f"held out of {Path(p).name}" for p in aside[:3]),
        sections=sections,
        load=load,
        plot=(folder / card.PLOT).exists(),
    )


def _files(job: Job) -> tuple[Counter[str], Counter[str]]:
    """Examples of each file, trained on and held out; of a stream its sources, which nobody counted."""
    held = Counter(e.origin.rpartition(":")[0] for e in job.data.held)
    if isinstance(job.data.train, Stream):
        return Counter({s.path: 0 for s in job.data.train.sources}), held
    return Counter(o.rpartition(":")[0] for o in job.data.train.origins), held


def _data(job: Job) -> str:
    """The files with their rows and hashes, and what became of them."""
    used, held = _files(job)
    rows: list[tuple[str, ...]] = [("file", "examples trained on", "held out", "bytes", "SHA-256")]
    places = list(dict.fromkeys([*used, *held]))
    for place in places[:_LISTED]:
        file, name = Path(place), hub.parts(place)[0] if hub.is_hub(place) else Path(place).name
        known = (f"{file.stat().st_size:,}", f"`{card.digest(file)}`") if file.is_file() else ("", "not taken")
        rows.append((f"`{name}`", f"{used[place]:,}" if used.total() else "", f"{held[place]:,}", *known))
    if others := places[_LISTED:]:
        counts = (f"{sum(c[p] for p in others):,}" for c in (used, held))
        rows.append((f"{len(others):,} more files", *counts, "", "not taken"))
    tokens = f"{job.data.train.summary}; digest of the tokens `{job.data.train.digest()}`."
    return f"{card.table(rows)}\n\n{tokens}"


def _training(job: Job, entries: Sequence[Mapping[str, Any]], at: int | None) -> str:
    c, kind = job.config, job.mesh.devices.flat[0].device_kind
    steps = f"{entries[-1]['step'] if entries else job.steps:,} steps" + (f" (exported is step {at})" if at else "")
    spent = next((sum(m["seconds"].values()) for m in reversed(entries) if "seconds" in m), 0.0)
    hours = f"{spent / 3600:.2f} hours ({spent * job.mesh.size / 3600:.2f} device hours)"
    rows = f"{c.train.batch_size} rows of at most {job.data.train.length:,} tokens each"
    return f"{steps} of {rows}, on {job.mesh.size} × {kind} in {hours}."


def _settings(c: Config) -> str:
    """The hyper-parameters; folders of this machine by their last name."""
    shown: dict[str, Any] = {f"tuning.{k}": v for k, v in c.tuning.model_dump(mode="json").items()}
    shown |= {f"optim.{k}": v for k, v in c.optim.model_dump(mode="json").items() if k != "offload"}
    keys = "epochs steps batch_size accumulation compute_dtype param_dtype neftune ema seed"
    shown |= {f"train.{k}": getattr(c.train, k) for k in keys.split() if k != "epochs" or c.train.steps is None}
    shown |= {f"data.{k}": getattr(c.data, k) for k in ("max_length", "packing", "template", "train_on")}
    said = [(f"`{k}`", Path(v).name if isinstance(v, str) and "/" in v else v) for k, v in shown.items()]
    rows = [(k, json.dumps(v)) for k, v in said if v not in (None, [], {}, 0, False) or k in ("`train.seed`",)]
    return f"{card.table([('key', 'value'), *rows])}\n\nWhat is not named is off."


def _versions(job: Job) -> str:
    versions = environment.facts()["versions"] | job.about["versions"]
    return ", ".join(f"{k} {v}" for k, v in versions.items()) + "."
