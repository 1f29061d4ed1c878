"""A run as the model that another run starts from: its weights as they trained, in float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune import blueprint, config, distributed, log, optim
from jaxtune.checkpoint import Checkpoints
from jaxtune.config import Config
from jaxtune.errors import UserError
from jaxtune.hf import files
from jaxtune.layers import unbox
from jaxtune.tuning import method as tuning_method

CONFIG, CHECKPOINTS, BEST = "config.yaml", "checkpoints", "best"  # parts of a run folder


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, and no model's."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def model_folder(folder: Path, prepare: Callable[[Config], Any]) -> Path:
    """The weights of a run's newest whole checkpoint, or of its best, as a Hugging Face folder in float32.

    An export has the base's own dtype, often bfloat16, to which trained weights are rounded; here nothing is. The
    folder is written once, into the run's, as `model-<step>-<digest>`, by the first of several processes. `prepare` is
    `job.prepare`.

    Raises:
      UserError: the run has no checkpoint that is whole.
    """
    c = config.load(folder / CONFIG)
    best = c.evaluate.best and (folder / BEST).is_dir()
    checkpoints = Checkpoints(folder / (BEST if best else CHECKPOINTS), read_only=True)
    if (step := checkpoints.newest) is None:
        raise UserError(f"model {folder}: this run has no checkpoint yet; `jaxtune train` goes on with it")
    target = folder / f"model-{'best-' if best else ''}{step}-{checkpoints.digest(step)}"
    if not distributed.from_first("written" if target.exists() else ""):
        job = prepare(c)
        b = job.blueprint
        wanted = {"trainable": job.state.trainable} if best else job.state.saved()
        with jax.set_mesh(job.mesh):
            found, _ = checkpoints.restore(step, wanted)
            trained = found["trainable"] if best else optim.averaged(found["optimiser"], found["trainable"])
            frozen = unbox(blueprint.materialise(b, jax.random.key(c.train.seed), base=False))
            parts = tuning_method.student(trained), tuning_method.split(frozen, b.labels)[1]
            weights = tuning_method.join(*(parts if distributed.count() == 1 else distributed.gathered(parts)))
        if distributed.first():
            _write(target, job, blueprint.boxed(b, weights))
        distributed.wait("the model is written")
        log.say(f"{folder}: the weights of step {step} are in {target}, in float32")
    checkpoints.close()
    return target


def _write(target: Path, job: Any, weights: Any) -> None:
    b = job.blueprint
    with files.whole(target, replace=True) as out:
        files.copy_files(b.folder, out, [*files.LICENCE_FILES, *files.SIDE_FILES])
        files.write_folder(out, blueprint.full_tensors(b, weights, np.dtype(np.float32)))
        blueprint.write_config(out, blueprint.dense_config(b.folder), b.decoder, "float32")
        if job.data.template:
            (out / "chat_template.jinja").write_text(job.data.template)
        job.tokenizer.save_pretrained(out)
