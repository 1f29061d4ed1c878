"""Figures of a sweep, as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxtune.config import Range, Sweep

if TYPE_CHECKING:  # the range test does without optuna
    from optuna.trial import FrozenTrial

BLUE, RED, GREY = "#4477aa", "#cc3311", "#bbbbbb"


def figure(width: float = 7, height: float = 4) -> tuple[Figure, Any]:
    """An empty figure and its axes."""
    f = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(f)
    axes = f.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return f, axes


def history(trials: Sequence["FrozenTrial"], best: "FrozenTrial", metric: str, file: Path) -> None:
    """The score of each trial and the best so far; trials that were ended early at their last score."""
    f, axes = figure()
    done = [(t.number, t.value) for t in trials if t.state.name == "COMPLETE" and t.value is not None]
    early = [(t.number, t.value) for t in trials if t.state.name == "PRUNED" and t.value is not None]
    axes.plot(*zip(*done, strict=True), "o", color=BLUE, label="done")
    if early:
        axes.plot(*zip(*early, strict=True), "x", color=GREY, label="ended early")
    pick = min if best.value == min(v for _, v in done) else max
    axes.step([n for n, _ in done], [pick(v for _, v in done[: i + 1]) for i in range(len(done))], where="post",
              color=RED, label="best so far")  # fmt: skip
    axes.set_xlabel("trial")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    f.savefig(file)


def importance(shares: Mapping[str, float], metric: str, file: Path) -> None:
    """How much each key explains."""
    f, axes = figure(height=1 + 0.4 * len(shares))
    names = sorted(shares, key=lambda k: shares[k])
    axes.barh(names, [shares[n] for n in names], color=BLUE)
    axes.set_xlabel(f"share of the variance of {metric} (fANOVA)")
    f.savefig(file)


def parallel(trials: Sequence["FrozenTrial"], sweep: Sweep, metric: str, file: Path) -> None:
    """A line for each trial over its values, coloured by its score."""
    import math

    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    done = [t for t in trials if t.state.name == "COMPLETE" and t.value is not None]
    keys = [k for k in sweep.keys if any(k in t.params for t in done)]
    f, axes = figure(width=max(5, 2 + 1.8 * len(keys)))
    scores = [t.value or 0.0 for t in done]
    norm = Normalize(min(scores), max(scores) if max(scores) > min(scores) else min(scores) + 1)
    places: dict[str, dict[Any, float]] = {}
    for x, key in enumerate(keys):
        tried, values = sweep.keys[key], sorted({t.params[key] for t in done if key in t.params}, key=_order)
        if isinstance(tried, Range) and tried.high > tried.low:
            scale = math.log if tried.log else float
            low, high = scale(tried.low), scale(tried.high)
            places[key] = {v: (scale(v) - low) / (high - low) for v in values}
            marks = {f"{tried.low:g}": 0.0, f"{tried.high:g}": 1.0}
        else:
            places[key] = {v: i / max(len(values) - 1, 1) for i, v in enumerate(values)}
            marks = {str(v): y for v, y in places[key].items()}
        axes.axvline(x, color=GREY, linewidth=1)
        for text, y in marks.items():
            axes.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center")
    for t in done:
        points = [(x, places[k][t.params[k]]) for x, k in enumerate(keys) if k in t.params]
        axes.plot(*zip(*points, strict=True), "-o", color=colormaps["viridis"](norm(t.value or 0.0)), markersize=3)
    axes.set_xticks(range(len(keys)), keys, fontsize=8)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    f.colorbar(ScalarMappable(norm, "viridis"), ax=axes, label=metric)
    f.savefig(file)


def _order(value: Any) -> tuple:
    return isinstance(value, str), value if isinstance(value, int | float) else 0.0, str(value)


def rates(points: Sequence[tuple[float, float, float]], marks: Mapping[str, float], file: Path) -> None:
    """Losses and smoothed losses over learning rates, with lines at the rates of `marks`."""
    f, axes = figure()
    x, raw, smooth = zip(*points, strict=True)
    axes.plot(x, raw, color=GREY, linewidth=0.8, label="loss")
    axes.plot(x, smooth, color=BLUE, label="smoothed")
    for (text, at), colour in zip(marks.items(), (RED, "#228833", "#aa3377"), strict=False):
        axes.axvline(at, color=colour, linestyle="--", linewidth=1, label=f"{text} {at:.2g}")
    low, high = min(*raw, *smooth), smooth[0]
    axes.set_ylim(low - 0.1 * (high - low) - 0.01, high + 0.6 * (high - low) + 0.05)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    f.savefig(file)
