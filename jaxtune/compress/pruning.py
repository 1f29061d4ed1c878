"""A model pruned, from a folder to a folder with a report; and loss against sparsity, for a picture of it."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune import __version__, config, job, log
from jaxtune.compress import prune, sparse, structured, writing
from jaxtune.compress.writing import Opened
from jaxtune.data.pipeline import Rows
from jaxtune.errors import UserError, nearest
from jaxtune.hf import files, smaller
from jaxtune.tuned import Tuned

Tree = Any
STRUCTURED = ("heads", "channels", "layers")
METHODS = (*prune.METHODS, *STRUCTURED)
REPORT, SWEEP = "prune.json", "sweep"
_PACKS = 8  # masks of a byte


class Asked(NamedTuple):
    """What is asked for; see `jaxtune prune --help`."""

    method: str = "wanda"  # of METHODS
    sparsity: float | None = None  # a share of weights; structured, of heads, channels or layers
    pattern: str | None = None  # n:m, instead
    scope: str = "uniform"  # of prune.SCOPES
    budgets: Mapping[str, float] = {}  # see prune.Plan
    skip: Sequence[str] = ()
    by: str = "influence"  # layers: of structured.BY
    refit: bool = True  # heads and channels: see structured.thin
    data: str | None = None  # to calibrate with
    validation: str | None = None  # to measure with
    samples: int = 128  # rows of `data`
    length: int = 2048  # tokens of a row
    batch_size: int = 8
    seed: int = 0


class Made(NamedTuple):
    """A pruned model: as it computes, and as it is written."""

    model: Tuned
    weights: Tree  # that it computes with
    tensors: Mapping[str, files.Entry]
    changes: Mapping[str, Any]  # of config.json
    about: Mapping[str, Any]  # of the report: which heads, channels or layers stay


def write(source: str, target: Path, a: Asked, adapter: str | None = None, dtype: str = "float32") -> dict[str, Any]:
    """Prune a model into a Hugging Face folder, with a report beside it, `prune.json`.

    Args:
      source: a run, an export, an adapter or a model folder.
      target: the folder, which appears when it is complete.
      a: what is asked for.
      adapter: a PEFT folder to merge into the source first.
      dtype: what is computed in; what is written has the dtypes of the source's files.

    Returns: the report.

    Raises:
      UserError: what is asked for does not go together or does not fit the model, or the target exists.
    """
    began = time.perf_counter()
    check(a)
    files.refuse_full(target)
    opened = writing.open_for(source, adapter, dtype)
    rows, held = calibration(opened, a) if calibrates(a) else None, held_out(opened, a)
    made = make(opened, [] if rows is None else writing.batches(rows, a.batch_size), a)
    report = {
        "jaxtune": __version__, "model": source, "adapter": adapter, "dtype": dtype, **a._asdict(), **made.about,
        **counted(opened.source.tensors, made.tensors),
    }  # fmt: skip
    if rows is not None:
        report["calibration"] = {"rows": len(rows), "tokens": rows.tokens, "digest": rows.digest()}
    if held is not None:
        before = opened.scores(held, batch_size=a.batch_size)
        after = made.model.scores(held, a.batch_size, "pretrain", made.weights)
        report["scores"] = {"tokens": held.tokens, "before": before, "after": after}
    report["seconds"] = round(time.perf_counter() - began, 1)
    side = {REPORT: (json.dumps(report, indent=2) + "\n").encode()}
    writing.write(target, opened, made.tensors, made.changes, side, _card(report))
    return report


def make(opened: Opened, batches: Sequence[Mapping[str, np.ndarray]], a: Asked) -> Made:
    """The pruned model. `batches` are to calibrate with, see `calibrate.through`; magnitude alone needs none."""
    c, weights, config_hf = opened.model.blueprint.decoder, opened.weights, opened.source.config
    if a.method in prune.METHODS:
        plan = prune.Plan(a.method, sparse.target(a.sparsity, a.pattern), a.scope, a.budgets, a.skip)
        new = prune.prune(c, weights, batches, plan)
        return Made(opened.model, new, writing.tensors(opened, new), {}, {})
    of = {"heads": c.kv_heads, "channels": c.mlp, "layers": c.layers}[a.method]
    kept = of - round((a.sparsity or 0.0) * of)
    if kept < 1:
        raise UserError(f"--sparsity {a.sparsity}: no {a.method} of {of} would be left; lower it")
    if a.method == "layers":
        keep, found = structured.layers_to_keep(c, weights, batches, kept, a.by)
        made = smaller.drop_layers(opened.source.tensors, config_hf, keep)
        small, new = structured.only_layers(c, weights, keep)
        model = dataclasses.replace(opened.model, blueprint=opened.model.blueprint._replace(decoder=small))
        about = {"kept": keep, "distances": [round(float(d), 6) for d in found]}
        return Made(model, new, made.tensors, made.changes, about)
    drop = smaller.drop_heads if a.method == "heads" else smaller.drop_channels
    drop(opened.source.tensors, config_hf, [range(kept)] * c.layers)  # refused before anything is computed
    thin = structured.thin(c, weights, batches, a.method, kept, a.refit)
    made = drop(writing.tensors(opened, thin.weights), config_hf, thin.keep)
    return Made(opened.model, thin.weights, made.tensors, made.changes, {"kept": thin.keep})


def check(a: Asked) -> None:
    """Raises: UserError: what is asked for is unknown or does not go together."""
    for option, value, known in (
        ("--method", a.method, METHODS),
        ("--scope", a.scope, prune.SCOPES),
        ("--by", a.by, structured.BY),
    ):
        if value not in known:
            raise UserError(f"{option} {value!r} is not known{nearest(value, list(known))}")
    sparse.target(a.sparsity, a.pattern)
    if a.method in STRUCTURED and (a.pattern or a.budgets or a.skip or a.scope != "uniform"):
        raise UserError(
            f"--method {a.method} takes --sparsity alone, a share of the {a.method}; leave --pattern, --scope, "
            "--budget and --skip out"
        )


def calibrates(a: Asked) -> bool:
    """Whether rows are needed to calibrate with."""
    return a.method != "magnitude" or a.scope == "outliers"


def calibration(opened: Opened, a: Asked) -> Rows:
    """The rows to calibrate with."""
    return writing.rows_for(opened, a.data, a.samples, a.length, a.seed)


def held_out(opened: Opened, a: Asked) -> Rows | None:
    """The rows to measure with; of the demo its own, else those given, else None."""
    if a.validation is None and opened.name != config.DEMO:
        return None
    file = a.validation
    if file in (None, config.DEMO):
        file = str(job.DEMO_FOLDER / "validation.jsonl")
    return writing.rows_for(opened, file, None, a.length, a.seed)


# --- the report -----------------------------------------------------------------------------------------------------


def counted(before: Mapping[str, files.Entry], after: Mapping[str, files.Entry]) -> dict[str, Any]:
    """Parameters, zeros by kind of matrix, and bytes, of two sets of tensors; those of the second are made here.

    `packed` is what the second would take with a bit for each number of a matrix that has zeros, and those that are
    none: what a sparse format can save.
    """
    zeros: dict[str, list[int]] = {}
    packed = nonzero = 0
    for name, t in after.items():
        data, size = t.data(), prod(t.shape)
        there = int(np.count_nonzero(data))
        nonzero += there
        sparse_bytes = there * t.dtype.itemsize + -(-size // _PACKS)
        packed += min(t.nbytes, sparse_bytes)
        if name.startswith("model.layers.") and len(t.shape) > 1:
            kind = zeros.setdefault(name.removesuffix(".weight").rsplit(".", 1)[-1], [0, 0])
            kind[0], kind[1] = kind[0] + size - there, kind[1] + size
    every = [sum(x) for x in zip(*zeros.values(), strict=True)] if zeros else [0, 0]
    return {
        "zeros": {**{k: round(z / n, 4) for k, (z, n) in zeros.items()}, "all": round(every[0] / max(every[1], 1), 4)},
        "parameters": {
            "before": sum(prod(t.shape) for t in before.values()),
            "after": sum(prod(t.shape) for t in after.values()),
            "not_zero": nonzero,
        },
        "bytes": {
            "before": sum(t.nbytes for t in before.values()),
            "after": sum(t.nbytes for t in after.values()),
            "packed": packed,
        },
    }  # fmt: skip


def table(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A report in lines."""
    p, b = report["parameters"], report["bytes"]
    rows = [("zeros", ", ".join(f"{k} {100 * v:.1f} %" for k, v in report["zeros"].items()))]
    if report["method"] == "layers":
        rows = [("layers", f"{', '.join(map(str, report['kept']))} stay")]
    elif report["method"] in STRUCTURED:
        rows = [(report["method"], f"{len(report['kept'][0])} of each layer stay")]
    rows.append(("parameters", f"{p['before']:,} → {p['after']:,}, {p['not_zero']:,} of them not zero"))
    packed = f"packed as bits and numbers {log.size(b['packed'])}"
    rows.append(("bytes", f"{log.size(b['before'])} → {log.size(b['after'])}; {packed}"))
    if "scores" in report:
        s = report["scores"]
        rows += [(k, f"{s['before'][k]:.4f} → {s['after'][k]:.4f}") for k in s["before"]]
    return rows


def _card(report: Mapping[str, Any]) -> str:
    lines = "\n".join(f"| {k} | {v} |" for k, v in table(report))
    tuning = "Zeros stay in tuning with `tuning: {method: full, keep_zeros: true}`, or `lora`."
    tuning = "" if report["method"] in STRUCTURED else tuning
    how = report["pattern"] or f"{100 * report['sparsity']:g} %"
    summary = f"Pruned by `{report['method']}` to {how}; all of it is in `{REPORT}`."
    return f"{summary}\n\n| | |\n|---|---|\n{lines}\n\n{tuning}\n"


# --- loss against sparsity ------------------------------------------------------------------------------------------


def sweep(
    source: str, target: Path, a: Asked, methods: Sequence[str], targets: Sequence[str], adapter: str | None = None
) -> list[dict[str, Any]]:
    """Loss and perplexity at each target by each method, into a folder: `sweep.json` and `sweep.png`.

    Args:
      source: as of `write`.
      target: the folder of the two files.
      a: what else is asked for; its `validation` is measured.
      methods: of METHODS.
      targets: shares such as "0.5" and patterns such as "2:4".
      adapter: as of `write`.

    Raises:
      UserError: there is nothing to measure with, or what is asked for does not go together.
    """
    asked = [a._replace(method=m, **_as_asked(t)) for m in methods for t in targets]
    for x in asked:
        check(x)
    files.refuse_full(target)
    opened = writing.open_for(source, adapter)
    if (held := held_out(opened, a)) is None:
        raise UserError("--sweep measures loss, and no rows are given for it; give --validation FILE")
    needs = next((x for x in asked if calibrates(x)), None)
    batches = [] if needs is None else writing.batches(calibration(opened, needs), a.batch_size)
    points: list[dict[str, Any]] = []
    one: Asked | None
    for one in (None, *asked):
        made = None if one is None else make(opened, batches, one)
        model, weights = (opened.model, opened.weights) if made is None else (made.model, made.weights)
        s = model.scores(held, a.batch_size, "pretrain", weights)
        name, share, pattern = ("dense", 0.0, None) if one is None else (one.method, one.sparsity, one.pattern)
        share = sparse.target(None, pattern).share if pattern else share
        points.append({"method": name, "sparsity": share, "pattern": pattern, **s})
        log.say(f"{name:<10}  {pattern or share:>5}  loss {s['loss']:.4f}  perplexity {s['perplexity']:.2f}")
    with files.whole(target) as folder:
        about = {"jaxtune": __version__, "model": source, "adapter": adapter, **a._asdict(), "points": points}
        (folder / f"{SWEEP}.json").write_text(json.dumps(about, indent=2) + "\n")
        _draw(points, folder / f"{SWEEP}.png")
    return points


def _as_asked(target: str) -> dict[str, Any]:
    if ":" in target:
        return {"sparsity": None, "pattern": target}
    try:
        return {"sparsity": float(target), "pattern": None}
    except ValueError as e:
        raise UserError(f"--sweep {target!r}: is neither a share nor n:m; write it as in 0.1,0.3,0.5,2:4") from e


def _draw(points: Sequence[Mapping[str, Any]], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = ("#4477aa", "#cc3311", "#228833", "#aa3377", "#ccbb44", "#66ccee")
    for m, colour in zip(dict.fromkeys(p["method"] for p in points[1:]), colours, strict=False):
        mine = [p for p in points if p["method"] in ("dense", m)]
        line = sorted((100 * p["sparsity"], p["loss"]) for p in mine if not p["pattern"])
        axes.plot(*zip(*line, strict=True), color=colour, marker="o", markersize=4, label=m)
        for p in mine:
            if p["pattern"]:
                axes.plot(100 * p["sparsity"], p["loss"], color=colour, marker="x", linestyle="none")
                axes.annotate(p["pattern"], (100 * p["sparsity"], p["loss"]), (4, 4), textcoords="offset points")
    axes.axhline(points[0]["loss"], color="#888888", linewidth=0.8, linestyle=":")
    axes.set_xlabel("pruned (%)")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file)
