"""What a run hands back: an adapter or a whole Hugging Face folder, and its model card."""

import os
import shutil
from pathlib import Path
from typing import Any

from jaxtune import blueprint, config, distributed, log
from jaxtune.blueprint import Blueprint
from jaxtune.config import DEMO, Config
from jaxtune.errors import UserError
from jaxtune.hf import adapters, files, soft_prompts, tokenizer
from jaxtune.job import CONFIG, EXPORT, EXPORTS, Job, data_with_demo
from jaxtune.models import heads
from jaxtune.nodes import soft_prompt
from jaxtune.tuning import adalora
from jaxtune.tuning import method as tuning_method

Tree = Any


def export(job: Job, weights: Tree) -> Path:
    """Write `export/`: a PEFT adapter after LoRA, else a whole Hugging Face folder. It appears when it is complete.

    The first process writes for all; see `distributed.gathered`.
    """
    target = Path(job.config.output) / EXPORT
    if not distributed.first():
        return target
    write_export(target, job.blueprint, blueprint.boxed(job.blueprint, weights), job.config, job.data.template)
    log.write_whole(target.parent / "README.md", _card(job, target))
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
        write_export(folder / f"step-{n}", job.blueprint, boxed, job.config, job.data.template)
        there = sorted((f for f in folder.glob("step-*")), key=lambda f: int(f.name.removeprefix("step-")))
        for old in [f for f in there if int(f.name.removeprefix("step-")) <= n][: -job.config.checkpoint.keep]:
            shutil.rmtree(old)
    except (OSError, UserError) as e:
        log.warn(f"{folder / f'step-{n}'}: is not exported ({' '.join(str(e).split())}); training goes on")


def write_export(
    target: Path, b: Blueprint, weights: Tree, c: Config, template: str | None, whole: bool = False
) -> None:
    """The tuned model as a folder: an adapter where the method is LoRA and `whole` is not asked for."""
    with files.whole(target, replace=True) as folder:
        files.copy_files(b.folder, folder, files.LICENCE_FILES)
        if isinstance(c.tuning, config.Adapter) and not whole:
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
            if heads.to_hf(b.decoder.task, hf := blueprint.read_config(b.folder), b.decoder.family):  # another head
                blueprint.write_config(folder, hf, b.decoder)
        else:
            files.copy_files(b.folder, folder, files.SIDE_FILES)
            files.write_folder(folder, blueprint.full_tensors(b, weights))
            blueprint.write_config(folder, blueprint.read_config(b.folder), b.decoder)
        if c.vocabulary.add or c.vocabulary.special:
            grown = tokenizer.load(folder)
            tokenizer.add(grown, c.vocabulary.add, c.vocabulary.special)
            grown.save_pretrained(folder)
        if template and tokenizer.load(folder).chat_template != template:
            (folder / "chat_template.jinja").write_text(template)


def _card(job: Job, target: Path) -> str:
    """The model card: what was trained, on what, how, and how to load it."""
    c = job.config
    metrics = log.read_metrics(Path(c.output) / "metrics.jsonl")
    held = [m for m in metrics if "eval_loss" in m]
    scores = ""
    if held:
        names = [k for k in held[-1] if k.startswith("eval_")]
        rows = [f"| {k[5:]} | {held[0][k]:.4f} | {held[-1][k]:.4f} |" for k in names if k in held[0]]
        scores = "\n".join(["| validation | before | after |", "|---|---|---|", *rows]) + "\n\n"
    sources = "\n".join(f"- `{Path(s.path).name}`" for s in data_with_demo(c.data).sources)
    versions = ", ".join(f"{k} {v}" for k, v in job.about["versions"].items())
    use = f"jaxtune chat {target}"
    if (head := job.blueprint.decoder.task) is not None:
        labels = f", labels {', '.join(head.labels[:20])}{' …' if len(head.labels) > 20 else ''}"
        use = f"jaxtune predict {target} rows.jsonl --out answers.jsonl   # a head for {head.kind}{labels}"
    library = "peft" if isinstance(c.tuning, config.Adapter) else "transformers"
    return (
        f"---\nbase_model: {c.model}\nlibrary_name: {library}\n"
        f"---\n\n# {Path(c.output).name}\n\n`{c.model}` tuned with jaxtune ({c.tuning.method}, "
        f"objective {c.objective}).\n\n"
        f"{scores}![loss](loss.png)\n\n## Data\n\n{sources}\n\n{job.data.train.summary}; "
        f"digest `{job.data.train.digest()}`.\n\n"
        f"## Training\n\n{job.steps} steps of {c.train.batch_size} rows of {job.data.train.length} tokens on "
        f"{job.mesh.size} × {job.mesh.devices.flat[0].device_kind}; {versions}. All settings are in `{CONFIG}`.\n\n"
        f"## Use\n\n```\n{use}\n```\n"
    )
