"""jaxtune: fine-tuning of large language models, native to JAX and TPU.

>>> import jaxtune
>>> run = jaxtune.train(model="demo", data="demo", output="runs/demo")  # doctest: +SKIP
>>> run.generate("What does the fox eat?")  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.errors import UserError

if TYPE_CHECKING:
    from jaxtune.tuned import Run, Tuned

__version__ = "0.1.0"
__all__ = ["UserError", "load", "load_several", "train"]


def train(config: str | Path | None = None, overrides: Mapping[str, Any] | None = None, **keys: Any) -> Run:
    """Train, the same way as `jaxtune train CONFIG key=value …`, and give the finished run.

    Args:
      config: a YAML file; its keys can all be given as arguments instead.
      overrides: dotted keys, such as `{"train.steps": 20}`.
      keys: sections or values, such as `model="…"`, `tuning={"rank": 16}`; `data="f.jsonl"` stands for `data.train`.

    Raises:
      UserError: something does not fit; the message says what, where, and what to do.
    """
    from jaxtune import config as configs
    from jaxtune import run
    from jaxtune.tuned import Run

    if isinstance(keys.get("data"), str | Path):
        keys["data"] = {"train": str(keys["data"])}
    layers = [configs.nested(keys), configs.nested(overrides or {})]
    return Run(run.train(configs.load(Path(config) if config is not None else None, *layers)))


def load(model: str | Path, adapter: str | None = None, dtype: str = "float32") -> Tuned:
    """Open a run folder, an export, a Hugging Face folder, or a base with an adapter, to generate from it."""
    from jaxtune.tuned import open_model

    return open_model(str(model), adapter, dtype)


def load_several(model: str | Path, adapters: Sequence[str | Path], dtype: str = "float32") -> dict[str, Tuned]:
    """Open a base under each of several adapters and under none ("none"), by name; its arrays are held once.

    >>> models = load_several("base", ["runs/sums/export", "runs/poems/export"])  # doctest: +SKIP
    >>> {name: m.answer("2 + 3 =") for name, m in models.items()}  # doctest: +SKIP
    {'sums': ' 5', 'poems': ' Two and three,', 'none': ' 2'}
    """
    from jaxtune.tuned import open_models

    return open_models(str(model), [str(a) for a in adapters], dtype)
