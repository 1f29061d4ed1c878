"""What is planned: a job from a config alone, on devices that need not be there; neither weights nor data are read.

The model is a folder with a config.json, a hub id of which that file alone is fetched, or the name of a preset. Rows
have `data.max_length` tokens, and the columns that training's have. Tokens that a tokenizer has beyond the model's
table are not known here and not counted.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune import blueprint, config, job, sharding, teacher
from jaxtune.blueprint import Blueprint
from jaxtune.config import DEMO, Config
from jaxtune.data.batches import Beside, Rows
from jaxtune.data.encode import Encoded
from jaxtune.data.pipeline import Prepared
from jaxtune.errors import UserError, nearest
from jaxtune.job import Job
from jaxtune.models import families
from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.heads import CLASSES, TaskHead
from jaxtune.models.presets import PRESETS
from jaxtune.teacher import Teacher
from jaxtune.tuning import method as tuning_method

STEPS = 1000  # of a run whose data is not looked at: schedules depend on them, costs do not


def model_config(name: str) -> dict[str, Any]:
    """The config.json of a model: a preset's, a folder's, the demo's, or the hub's.

    Raises:
      UserError: there is no such model.
    """
    folder = job.DEMO_FOLDER / "model" if name == DEMO else Path(name).expanduser()
    if folder.is_dir():
        return blueprint.read_config(folder)
    if (preset := folder.name) in PRESETS:  # in a file, names are paths from there
        return PRESETS[preset]
    if name.count("/") != 1 or folder.is_absolute() or name.startswith("."):
        if "://" in name:
            return blueprint.read_config(job.model_folder(name))
        raise UserError(f"model {name}: neither a folder nor a preset{nearest(name, list(PRESETS))}")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return blueprint.read_config(Path(huggingface_hub.hf_hub_download(name, "config.json")).parent)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        raise UserError(
            f"model {name}: its config.json is not to be had from the hub ({type(e).__name__}); give a folder, or a "
            f"preset{nearest(name.rpartition('/')[2].lower(), list(PRESETS))}"
        ) from e


def imagined(c: Config, devices: Any, layers: int | None = None, device: Any = None) -> Job:
    """The job of a config on these devices, of a model with so many layers, or with its own where none are given.

    Args:
      c: the config.
      devices: of a topology, or of this machine; as `sharding.make_mesh` takes them.
      layers: how many of the model's layers there are to be.
      device: what attention's kernel is chosen for, where that is not among `devices`; its `platform` is enough.

    Raises:
      UserError: something of the config does not fit.
    """
    hf = model_config(c.model)
    decoder = families.from_hf(hf, f"{c.model}: config.json")
    if layers is not None:
        decoder = shortened(decoder, layers)
    mesh = sharding.make_mesh(c.mesh, devices)
    sharding.check_length(mesh, c.data.max_length)
    drawn, tail = _blueprint(c, decoder, mesh, device)
    example = Encoded(np.zeros(c.data.max_length, np.int32), np.ones(c.data.max_length, bool), tail)
    rows = Rows([example], ["planned"], [[0]], c.data.max_length)
    t = None if c.distill is None else _teacher(c, drawn, mesh, device)
    if t is not None and t.c.top_k is not None:
        beside = Beside(None, teacher.planned(t.c.top_k, t.blueprint.decoder.vocab))
        rows = dataclasses.replace(rows, beside=beside)
    return job.assemble(c, Prepared(rows, None, None, []), None, drawn, mesh, c.train.steps or STEPS, taught=t)


def few_layers(job: Job) -> tuple[int, int] | None:
    """Two numbers of layers, from which one can go on to all: whole periods of the kinds of layers, at least two layers
    to each stage, so that their loop stays one. None where the layers do not all train alike."""
    d = job.blueprint.decoder
    if len(d.groups) > 1:
        return None
    kinds = list(zip(d.windows or (0,) * d.layers, d.rope_of or (0,) * d.layers, strict=True))
    period = next(p for p in range(1, d.layers + 1) if kinds[p:] == kinds[: d.layers - p])
    stages = job.mesh.shape["stage"]
    step = math.lcm(period, stages)
    least = step if step >= 2 * stages else 2 * step
    return least, least + step


def shortened(decoder: DecoderConfig, layers: int) -> DecoderConfig:
    """The same model with fewer layers, of the kinds that its last layers are."""
    return dataclasses.replace(
        decoder, layers=layers, rope_of=decoder.rope_of[-layers:], windows=decoder.windows[-layers:]
    )


def _blueprint(
    c: Config, decoder: DecoderConfig, mesh: jax.sharding.Mesh, device: Any
) -> tuple[Blueprint, dict[str, np.ndarray]]:
    """The blueprint, and the columns that its objective wants beside those of text."""
    columns: dict[str, np.ndarray] = {}
    if c.objective in CLASSES:
        labels = tuple(c.data.labels) or ("0", "1")
        decoder = dataclasses.replace(decoder, task=TaskHead(c.objective, labels), tied=False)
        columns = _columns(c.objective, c.data.max_length)
    elif decoder.task is not None:
        decoder = dataclasses.replace(decoder, task=None)
    stored = decoder.vocab
    vocab = stored + len(c.vocabulary.add) + len(c.vocabulary.special)
    decoder = dataclasses.replace(decoder, vocab=vocab, vocab_rows=blueprint.table_rows(vocab, c.vocabulary.multiple))
    read = job.going_on(c.tuning) if isinstance(c.tuning, config.Lora) else None
    training = tuning_method.Training(c.train.steps or STEPS, c.optim, c.train)
    s = blueprint.sketch(
        decoder,
        lambda d: job.make_method(c.tuning, read, d, training),
        c.train.compute_dtype,
        c.train.remat,
        c.train.param_dtype,
    )
    s, where, places = blueprint.lay_out(s, mesh, c.train.attention, sharding.rules(c.mesh), device)
    b = Blueprint(Path(c.model), s.decoder, s.method, s.plain, s.weights, s.labels, where, places, {}, {}, stored)
    return b, columns


def _teacher(c: Config, student: Blueprint, mesh: jax.sharding.Mesh, device: Any) -> Teacher:
    """The teacher of a config, whose tokenizer is not looked at."""
    assert c.distill is not None
    decoder = families.from_hf(model_config(c.distill.teacher), f"{c.distill.teacher}: config.json")
    teacher.check(c, decoder, student)
    s = blueprint.sketch(decoder, lambda _: teacher.frozen(), c.train.compute_dtype)
    s, where, places = blueprint.lay_out(s, mesh, c.train.attention, sharding.rules(c.mesh), device)
    folder = Path(c.distill.teacher)
    b = Blueprint(folder, s.decoder, s.method, s.plain, s.weights, s.labels, where, places, {}, {}, decoder.vocab)
    return Teacher(c.distill, b, teacher.matching(c.distill, student.decoder, decoder, c.train.param_dtype), mesh)


def _columns(objective: str, length: int) -> dict[str, np.ndarray]:
    """One example's own columns, as `data.heads` lays them out."""
    zero = np.array(0, np.int32)
    columns: dict[str, dict[str, np.ndarray]] = {
        "classification": {"label_S": zero},
        "regression": {"label_S": np.array(0, np.float32)},
        "token_classification": {"label_T": np.zeros(length, np.int32)},
        "span_qa": {"start_S": zero, "end_S": zero},
    }
    return columns[objective]
