"""In a notebook: one output that is drawn anew in place, with how far a run is and the curve of its loss."""

import html
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

_WIDTH, _HEIGHT = 560, 120
_PAUSE_S = 0.3  # between two drawings


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, in Jupyter, Colab or an editor."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")


class Live:
    """Progress, a line of text, and losses over steps; `show` draws them in the place of what was there."""

    def __init__(self, total: int) -> None:
        from IPython.display import HTML, display

        self.total, self._html, self._drawn = total, HTML, 0.0
        self._handle: Any = display(HTML(""), display_id=True)

    def show(self, n: int, line: str, history: Sequence[Mapping[str, Any]], at_once: bool = False) -> None:
        """After step `n`; not more often than the eye follows, but for `at_once`."""
        if at_once or time.perf_counter() - self._drawn > _PAUSE_S:
            self._drawn = time.perf_counter()
            bar = f'<progress value="{n}" max="{self.total}" style="width:{_WIDTH}px"></progress>'
            text = f'<div style="font-family:monospace">{html.escape(line)}</div>'
            self._handle.update(self._html(f"{bar}{text}{curve(history, self.total)}"))


def curve(history: Sequence[Mapping[str, Any]], total: int) -> str:
    """Losses over steps as SVG: a line for training, dots for validation.

    >>> curve([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}], 2).count("circle")
    1
    """
    train = [(m["step"], m["loss"]) for m in history if math.isfinite(m.get("loss", math.nan))]
    held = [(m["step"], m["eval_loss"]) for m in history if math.isfinite(m.get("eval_loss", math.nan))]
    if len(train) + len(held) < 2:
        return ""
    top, low = max(v for _, v in train + held), min(v for _, v in train + held)

    def place(step: float, value: float) -> tuple[float, float]:
        return 6 + (_WIDTH - 12) * step / total, 6 + (_HEIGHT - 12) * (top - value) / max(top - low, 1e-9)

    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in train))
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#cc3311"/>' for x, y in (place(*p) for p in held))
    said = f"loss from {top:.3g} (top) to {low:.3g} (bottom); blue: training" + ("; red: validation" if held else "")
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{said}">'
        f'<polyline points="{points}" fill="none" stroke="#4477aa" stroke-width="1.6"/>{dots}</svg>'
        f'<div style="font-size:smaller;opacity:.7">{said}</div>'
    )
