"""jaxtune: fine-tuning of large language models, native to JAX and TPU.

>>> import jaxtune
>>> run = jaxtune.train(model="demo", data="demo", output="runs/demo")  # doctest: +SKIP
>>> run.generate("What does the fox eat?")  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxtune.errors import UserError

if TYPE_CHECKING:
    from jaxtune.planning import Report
    from jaxtune.tuned import Run, Tuned

__version__ = "0.1.0"
__all__ = ["UserError", "load", "load_several", "plan", "train"]


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


def plan(
    config: str | Path | None = None,
    topologies: str | Sequence[str] = "v5e-8",
    overrides: Mapping[str, Any] | None = None,
    how: Literal["full", "fast", "rule"] = "full",
    prices: Mapping[str, float] | None = None,
    **keys: Any,
) -> list[Report]:
    """What a run takes on machines that need not be here, see `jaxtune.planning.plan`; config and keys as of `train`.

    TPUs are compiled for in this process, which is then best kept to its CPU: `JAX_PLATFORMS=cpu`.

    >>> jaxtune.plan("llama3-8b-lora.yaml", ["v5e-8", "v6e-8"], model="llama3.1-8b")[0].fits  # doctest: +SKIP
    True
    """
    from jaxtune import config as configs
    from jaxtune import planning

    names = [topologies] if isinstance(topologies, str) else list(topologies)
    c = configs.load(
        Path(config) if config is not None else None, configs.nested(keys), configs.nested(overrides or {})
    )
    return planning.plan(c, names, how, prices)


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
