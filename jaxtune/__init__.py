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
    from jaxtune.search import Sweep
    from jaxtune.tuned import Run, Tuned

__version__ = "0.1.0"
__all__ = ["UserError", "explain", "load", "load_several", "plan", "prune", "push", "quantize", "sweep", "train"]


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext jaxtune` in a notebook: `%jaxtune VERB …` are the verbs, in the process that holds the devices.

    >>> %load_ext jaxtune                              # doctest: +SKIP
    >>> %jaxtune evaluate {run.folder} test.jsonl      # doctest: +SKIP
    """
    from jaxtune.cli import magic

    magic.register(shell)


def train(config: str | Path | None = None, overrides: Mapping[str, Any] | None = None, **keys: Any) -> Run:
    """Train, the same way as `jaxtune train CONFIG key=value …`, and give the finished run.

    Args:
      config: a YAML file; its keys can all be given as arguments instead.
      overrides: dotted keys, such as `{"train.steps": 20}`.
      keys: sections or values, such as `model="…"`, `tuning={"rank": 16}`; `data="f.jsonl"` stands for `data.train`.

    >>> run = jaxtune.train("quickstart.yaml", output="runs/demo", tuning={"rank": 4})  # doctest: +SKIP
    >>> run.metrics[-1]["eval_loss"] < run.metrics[0]["loss"]  # doctest: +SKIP
    True

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


def sweep(config: str | Path | None = None, overrides: Mapping[str, Any] | None = None, **keys: Any) -> Sweep:
    """Search as the section `sweep` of a config says, see `jaxtune.search.sweep`; config and keys as of `train`.

    >>> found = jaxtune.sweep(data="demo", sweep={"keys": {"tuning.rank": [4, 8]}, "trials": 2})  # doctest: +SKIP
    >>> found.best["values"]  # doctest: +SKIP
    {'tuning.rank': 8}
    """
    from jaxtune import config as configs
    from jaxtune import search

    if isinstance(keys.get("data"), str | Path):
        keys["data"] = {"train": str(keys["data"])}
    layers = [configs.nested(keys), configs.nested(overrides or {})]
    return search.sweep(configs.load(Path(config) if config is not None else None, *layers))


def load(model: str | Path, adapter: str | None = None, dtype: str = "float32") -> Tuned:
    """Open a run folder, an export, a Hugging Face folder, or a base with an adapter, to generate from it.

    >>> jaxtune.load("runs/demo").answer("What does the fox eat?")  # doctest: +SKIP
    ' The fox eats berries.'
    """
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


def explain(
    model: str | Path,
    inputs: str | Sequence[Any],
    out: str | Path | None = None,
    adapter: str | None = None,
    dtype: str = "float32",
    **wish: Any,
) -> dict[str, Any]:
    """Why a model says what it says to texts or rows: a report, see `jaxtune.explaining.explain`; written to `out` as a
    page and as JSON, where that is given. The further keys are those of `jaxtune.explaining.Wish`.

    >>> report = jaxtune.explain("runs/demo", "What does the fox eat?", out="why")  # doctest: +SKIP
    >>> report["inputs"][0]["attributions"]["scores"]["occlusion"]  # doctest: +SKIP
    """
    from jaxtune import explaining

    texts = [inputs] if isinstance(inputs, str) else inputs
    report = explaining.explain(str(model), texts, explaining.Wish(**wish), adapter, dtype)
    if out is not None:
        explaining.write(report, Path(out))
    return report


def prune(model: str | Path, to: str | Path, **asked: Any) -> dict[str, Any]:
    """Write a pruned model and give its report, as `jaxtune prune MODEL DST` does.

    Args:
      model: a run folder, an export, or a model folder.
      to: the folder that is written.
      asked: fields of `jaxtune.compress.pruning.Asked`, and `adapter` and `dtype`.

    >>> jaxtune.prune("demo", "smaller", method="wanda", pattern="2:4")["zeros"]["all"]  # doctest: +SKIP
    0.5
    """
    from jaxtune.compress import pruning

    more = {k: asked.pop(k) for k in ("adapter", "dtype") if k in asked}
    if unknown := set(asked) - set(pruning.Asked._fields):
        raise UserError(f"prune: {sorted(unknown)[0]!r} is not known; there are {', '.join(pruning.Asked._fields)}")
    return pruning.write(str(model), Path(to), pruning.Asked(**asked), **more)


def quantize(
    model: str | Path,
    out: str | Path,
    method: str = "rtn",
    dtype: str | None = None,
    format: str | None = None,
    group: int = 128,
    data: str | Path | None = None,
    held_data: str | Path | None = None,
    samples: int = 128,
    length: int = 2048,
    task: str | None = None,
    adapter: str | None = None,
    symmetric: bool = True,
    act_order: bool = False,
    strength: float = 0.5,
    speed: bool = True,
) -> dict[str, Any]:
    """Write a model in fewer bits, as `jaxtune quantize` does, and give its report: numbers before and after.

    >>> report = jaxtune.quantize("runs/demo", "small", "gptq", data="rows.jsonl")  # doctest: +SKIP
    >>> report["after"]["bytes"] < report["before"]["bytes"]  # doctest: +SKIP
    True
    """
    from jaxtune.compress import quantize as verb

    want = verb.wanted(method, dtype, format, group, symmetric, act_order, strength)
    rows, held = (None if x is None else str(x) for x in (data, held_data))
    return verb.quantize(str(model), Path(out), want, adapter, rows, held, samples, length, task, speed)

    given = (None if x is None else str(x) for x in (data, held_data))
    return verb.quantize(str(model), Path(out), want, adapter, *given, samples, length, task, speed)


def push(folder: str | Path, name: str, public: bool = False, base: str | None = None, **options: str) -> str:
    """Upload an export with its card to the Hugging Face hub, where nobody else sees it unless it is `public`.

    Args:
      folder: a run folder or a model folder, see `jaxtune.push_hub.gather`.
      name: of the repository there, OWNER/NAME.
      public: whether everybody may see it.
      base: the hub's name of the base, where the export names a folder of this machine.
      options: `revision`, a branch; `message`, of the commit.

    Returns: its address.

    >>> push("runs/quickstart", "me/quickstart", base="meta-llama/Llama-3.2-1B")  # doctest: +SKIP
    'https://huggingface.co/me/quickstart'
    """
    from jaxtune import push_hub

    return push_hub.send(push_hub.gather(Path(folder), name, base), public, **options)
