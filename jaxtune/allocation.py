"""What an adaptive method trains, step by step: allocation.jsonl and allocation.png in the run folder."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import log

Tree = Any
Choice = Callable[[Tree], Mapping[str, jax.Array]]
_UNIT = re.compile(r"^layers/(\d+)(?:/(.+))?$")


class Allocation:
    """The record of a run folder: a line `{"step": …, "allocation": {unit: number}}` whenever it changed.

    The number is a rank, or 1 for what trains and 0 for what does not. Lines past `start` are dropped.
    """

    def __init__(self, folder: Path, start: int, choice: Choice) -> None:
        self.file, self.picture = folder / "allocation.jsonl", folder / "allocation.png"
        self.lines = [e for e in log.read_metrics(self.file) if e["step"] <= start]
        log.write_whole(self.file, "".join(json.dumps(e) + "\n" for e in self.lines))
        self._names: list[str] = []
        self._steps, self._pending = start, jnp.zeros(0)

        def stacked(optimiser: Tree) -> jax.Array:
            found = choice(optimiser)
            self._names = list(found)
            return jnp.stack(list(found.values()))

        self._numbers = jax.jit(stacked)

    def watching(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The training step, after which the allocation is looked at; it is fetched when the next one is on its way."""

        def watched(*args: Any) -> Any:
            state, report = step(*args)
            self.settle()
            self._steps, self._pending = self._steps + 1, self._numbers(state.optimiser)
            return state, report

        return watched

    def settle(self) -> None:
        """Write down what the last step left, if it is not what the last line says."""
        if not self._pending.size:
            return
        numbers = [int(x) for x in np.asarray(self._pending)]
        now = dict(zip(self._names, numbers, strict=True))
        if not self.lines or self.lines[-1]["allocation"] != now:
            self.lines.append({"step": self._steps, "allocation": now})
            if log.hushed():
                return
            try:
                with self.file.open("a") as f:
                    f.write(json.dumps(self.lines[-1]) + "\n")
            except OSError as e:
                log.warn(f"{self.file}: cannot be written ({e.strerror}); training goes on")

    def close(self) -> None:
        """Write the last line, and draw the picture."""
        self.settle()
        if log.hushed():
            return
        try:
            draw(self.lines, self._steps, self.picture)
        except OSError as e:
            log.warn(f"{self.picture}: cannot be written ({e.strerror})")


def draw(lines: Sequence[Mapping[str, Any]], end: int, file: Path) -> None:
    """Draw what was trained from step to step until `end`: a map of layers for each kind of module."""
    if not lines:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    kinds: dict[str, list[tuple[int, str]]] = {}
    for unit in lines[0]["allocation"]:
        m = _UNIT.match(unit)
        kinds.setdefault((m[2] or "layers") if m else unit, []).append((int(m[1]) if m else 0, unit))
    top = max(max(e["allocation"].values()) for e in lines)
    ranks = top > 1
    columns = min(len(kinds), 2)
    rows = math.ceil(len(kinds) / columns)
    deepest = 1 + max(n for units in kinds.values() for n, _ in units)
    height = min(max(1.5, 0.45 + 0.13 * deepest), 4.0)
    figure = Figure(figsize=(5.2 * columns + 1.2, height * rows + 0.9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    edges = [*(max(e["step"] - 1, 0) for e in lines), max(end, lines[-1]["step"])]
    if ranks:
        colours = ListedColormap(_shades(top + 1))
        norm = BoundaryNorm(np.arange(top + 2) - 0.5, top + 1)
    else:
        colours, norm = ListedColormap(["#e4e7ee", "#2b6cb0"]), BoundaryNorm([-0.5, 0.5, 1.5], 2)
    mesh = None
    for axes, (kind, units) in zip(grid.flat, sorted(kinds.items(), key=_order), strict=False):
        numbers = dict(units)
        low, high = min(numbers), max(numbers)
        values = np.full((high - low + 1, len(lines)), np.nan)
        for n, unit in numbers.items():
            values[n - low] = [e["allocation"][unit] for e in lines]
        mesh = axes.pcolormesh(edges, np.arange(low, high + 2) - 0.5, values, cmap=colours, norm=norm)
        axes.set_title(kind.replace("/", "."), fontsize=10)
        axes.set_ylabel("layer")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(kinds) :]:
        axes.set_visible(False)
    for axes in grid.flat[max(0, len(kinds) - columns) : len(kinds)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("step")
    assert mesh is not None
    bar = figure.colorbar(mesh, ax=grid, shrink=min(1.0, 3.2 / (height * rows)), aspect=18)
    if ranks:
        bar.set_label("rank")
        bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        bar.ax.minorticks_off()
    else:
        bar.set_ticks([0, 1], labels=["frozen", "trains"])
    figure.suptitle("Ranks that are left" if ranks else "What trains")
    figure.savefig(file)


def _order(item: tuple[str, Any]) -> tuple[int, str]:
    """Attention before the MLP, in the order in which a layer uses them."""
    known = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    last = item[0].rsplit("/", 1)[-1]
    return (known.index(last) if last in known else len(known)), item[0]


def _shades(n: int) -> list[Any]:
    """White-grey for none, then from light to dark."""
    from matplotlib import colormaps

    return ["#eeeeee", *(colormaps["YlGnBu"](x) for x in np.linspace(0.2, 1.0, n - 1))]
