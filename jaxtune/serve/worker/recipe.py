"""A job as a config of `jaxtune train`, and what "auto" became: rules that a user can say by heart.

| what | rule |
|-|-|
| n_epochs | 3; of fewer than 34 examples 100 // n, at most 25; of more than 8333, 25000 // n, at least 1 |
| batch_size | the largest power of two up to √n / 2, from 1 to 32 |
| learning rate | 2e-4 · √(10⁹ / parameters) for LoRA, from 1e-4 to 5e-3; a tenth of it where weights themselves train |
| learning_rate_multiplier | 1 |
| max_length | what is asked for, else 2048; no more than the model's context and the limit |
| numbers | float32 for models under 100 million parameters, else bfloat16 |

Each pass over the data ends with an evaluation and a checkpoint. A tuned adapter is gone on from; of a tuned whole
model, its folder is the base.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from jaxtune import config
from jaxtune.config import Config
from jaxtune.data.templates import TEMPLATES
from jaxtune.errors import UserError
from jaxtune.hf import tokenizer
from jaxtune.serve import bases
from jaxtune.serve.settings import Limits, Settings
from jaxtune.serve.store.storage import Storage
from jaxtune.serve.store.tables import Job, Model

MAX_LENGTH = 2048
_LOGGED = 1000  # lines of metrics that a run has at most, about
_SMALL = 100_000_000  # parameters
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


class Start(NamedTuple):
    """What a job starts from."""

    base: str
    """The name of the base model."""
    folder: Path
    """Its weights, or those of a tuned whole model."""
    adapter: Path | None
    """A tuned adapter to go on from."""

    @property
    def words(self) -> Path:
        """The folder of the tokenizer and the chat template: the adapter's, if it brings one."""
        brings = self.adapter is not None and any((self.adapter / f).exists() for f in tokenizer.FILES)
        return self.adapter if brings and self.adapter is not None else self.folder


def tuned_of(session: Session, job: Job) -> Model | None:
    """The tuned model of its project that a job goes on from."""
    return session.scalar(select(Model).where(Model.id == job.model, Model.project == job.project))


def start_of(job: Job, tuned: Model | None, settings: Settings, storage: Storage) -> Start:
    """What a job starts from: a base by its name, or a tuned model. Not in a transaction: a base may be fetched.

    Raises:
      UserError: there is no such model any more, or it is larger than the limit.
    """
    base = tuned.base if tuned is not None else job.model
    if tuned is not None and not storage.model(tuned).is_dir():
        raise UserError(f"model {job.model}: is not there any more; choose another model")
    if tuned is not None and tuned.kind == "whole":
        return Start(base, _sized(storage.model(tuned), settings.limits, job.model), None)
    folder = bases.found(settings).get(base)
    if folder is None and settings.hub:
        folder = _fetched(base, settings.limits)
    if folder is None:
        raise UserError(f"model {base}: is not there any more; put its folder back, or choose another model")
    adapter = None if tuned is None else storage.model(tuned)
    return Start(base, _sized(folder.resolve(), settings.limits, base), adapter)


def _fetched(name: str, limits: Limits) -> Path | None:
    """A hub model's snapshot, of safetensors, JSON and tokenizer files alone; None where the name is no hub id.

    Raises:
      UserError: it cannot be had, or is larger than the limit, which is seen before it is fetched.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        return None
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from jaxtune.hf import files

    wanted = [*files.SIDE_FILES, *files.LICENCE_FILES, "*.safetensors", "*.safetensors.index.json"]
    given: dict[str, Any] = {"allow_patterns": wanted, "ignore_patterns": ["consolidated*"]}
    try:
        try:
            about = huggingface_hub.model_info(name, files_metadata=True)
        except (HfHubHTTPError, OSError):  # the hub is away, or has it no more: what was fetched before will do
            return Path(huggingface_hub.snapshot_download(name, local_files_only=True, **given))
        size = sum(f.size or 0 for f in about.siblings or [] if f.rfilename.endswith(".safetensors"))
        if size > limits.model_bytes:
            raise UserError(f"model {name}: has {size} bytes of weights; the service takes {limits.model_bytes}")
        return Path(huggingface_hub.snapshot_download(name, revision=about.sha, **given))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        raise UserError(f"model {name}: cannot be had from the hub ({type(e).__name__})") from e


def _sized(folder: Path, limits: Limits, name: str) -> Path:
    if (size := sum(f.stat().st_size for p in _WEIGHTS for f in folder.glob(p))) > limits.model_bytes:
        raise UserError(f"model {name}: has {size} bytes of weights; the service takes {limits.model_bytes}")
    return folder


def parameters(folder: Path) -> int:
    """How many numbers the weights of a model folder are, by the heads of its files."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as f:
            head = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        total += sum(math.prod(t["shape"]) for name, t in head.items() if name != "__metadata__")
    return total or sum(f.stat().st_size for f in folder.glob("pytorch_model*.bin")) // 2


def context(folder: Path) -> int:
    """The tokens that a model can read."""
    given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int({**given, **given.get("text_config", {})}.get("max_position_embeddings") or MAX_LENGTH)


def max_length(knobs: Mapping[str, Any], folder: Path, limits: Limits) -> int:
    """Tokens of an example, from where it is cut."""
    return min(knobs.get("max_length") or MAX_LENGTH, context(folder), limits.sequence_length)


def template(knobs: Mapping[str, Any]) -> str:
    """The chat template: one of ours by name, or the model's own. Raises: UserError: there is no such."""
    name = knobs.get("template") or "auto"
    if name != "auto" and name not in TEMPLATES:
        raise UserError(f"template {name!r} is not known; allowed: auto, {', '.join(TEMPLATES)}")
    return name


def epochs(examples: int) -> int:
    """
    >>> epochs(10), epochs(100), epochs(20_000)
    (10, 3, 1)
    """
    if examples * 3 < 100:
        return min(25, 100 // max(1, examples))
    return max(1, 25_000 // examples) if examples * 3 > 25_000 else 3


def batch_size(examples: int) -> int:
    """
    >>> batch_size(10), batch_size(450), batch_size(100_000)
    (1, 8, 32)
    """
    return 2 ** min(5, max(0, int(math.log2(max(1.0, math.sqrt(examples) / 2)))))


def learning_rate(tuning: str, count: int) -> float:
    """
    >>> learning_rate("lora", 10**9), learning_rate("full", 10**9)
    (0.0002, 2e-05)
    """
    rate = min(5e-3, max(1e-4, 2e-4 * math.sqrt(1e9 / max(1, count))))
    return float(f"{rate if tuning in ('lora', 'qlora') else rate / 10:.3g}")


def resolved(given: Mapping[str, Any], examples: int, limits: Limits | None = None) -> dict[str, Any]:
    """Hyperparameters with what "auto" became for so many examples, within the limits; others stay as they are."""
    limits = limits or Limits()
    rules = {
        "n_epochs": min(epochs(examples), limits.epochs),
        "batch_size": min(batch_size(examples), limits.batch_size),
        "learning_rate_multiplier": 1.0,
    }
    found = {name: given.get(name) for name in rules}
    return {**given, **{name: rules[name] if x in (None, "auto") else x for name, x in found.items()}}


def make(job: Job, start: Start, settings: Settings, folder: Path, train: Path, held: Path | None) -> Config:
    """The config of a job whose hyperparameters are resolved.

    Args:
      job: the job.
      start: what it starts from.
      settings: the service's.
      folder: the job's, in which the run folder is.
      train: the training file, with an ending that says what it is.
      held: the validation file.

    Raises:
      UserError: it does not fit together.
    """
    knobs, h, count = job.knobs, job.hyperparameters, parameters(start.folder)
    small = count < _SMALL
    method = knobs.get("tuning") or "lora"
    rate = knobs.get("learning_rate") or learning_rate(method, count) * h["learning_rate_multiplier"]
    about = math.ceil(job.progress.get("examples", 0) * h["n_epochs"] / h["batch_size"])
    tree = {
        "model": str(start.folder),
        "output": str(folder / "run"),
        "data": {
            "train": str(train),
            "validation": str(held) if held is not None else 0.0,
            "max_length": max_length(knobs, start.folder, settings.limits),
            "packing": bool(knobs.get("packing")),
            "template": template(knobs),
            "cache": False,  # tokens of users' rows lie nowhere but in memory
        },
        "objective": "sft",
        "tuning": _tuning(method, knobs, start),
        "optim": {"learning_rate": rate, "schedule": "cosine", "warmup": 0.05},
        "train": {
            "epochs": h["n_epochs"],
            "batch_size": h["batch_size"],
            "compute_dtype": knobs.get("dtype") or ("float32" if small else "bfloat16"),
            "remat": "none" if small else "full",
            "seed": job.seed % 2**32,
            "log_every": max(1, about // _LOGGED),
        },
        "evaluate": {"every": 0},
        "checkpoint": {"every": 0, "keep": 3, "export": True},
    }
    return config.validate(tree, "job")


def _tuning(method: str, knobs: Mapping[str, Any], start: Start) -> Any:
    if start.adapter is not None and method not in ("lora", "qlora"):
        raise UserError(f"tuning {method}: the model is an adapter, which lora and qlora go on from; take its base")
    if method == "full":
        return {"method": "full"}
    if method == "freeze":
        return {"method": "freeze", "last": knobs.get("last") or 2}
    rank = knobs.get("rank") or 16
    return {
        "method": method,
        "rank": rank,
        "alpha": knobs.get("alpha") or 2 * rank,
        "adapter": str(start.adapter) if start.adapter is not None else None,
    }
