"""Pieces of the page: coloured text, bars, curves, maps. HTML and SVG that is escaped and loads nothing.

Colours lie over whatever the page's own are, so they are read on light and on dark.
"""

import base64
import io
from collections.abc import Sequence

import numpy as np

from jaxtune.prepare.page import escape

MORE, LESS, MAP = (46, 160, 110), (220, 90, 60), (70, 130, 200)  # adds to a value, takes from it, how much of something


def token_strip(tokens: Sequence[str], scores: Sequence[float], notes: Sequence[str] = ()) -> str:
    """A text whose tokens are coloured by what they add or take, the largest the strongest; `notes` are their titles,
    in the place of the numbers."""
    most = max((abs(s) for s in scores), default=0.0) or 1.0
    spans = []
    titles = notes or [f"{s:+.4f}" for s in scores]
    for token, score, title in zip(tokens, scores, titles, strict=True):
        shown = escape(token).replace("\n", "⏎")
        spans.append(f'<span class="tok" style="{colour(score, most)}" title="{escape(title)}">{shown}</span>')
        spans.append("<br>" if "\n" in token else "<wbr>")
    return f'<p class="strip">{"".join(spans)}</p>'


def colour(score: float, most: float) -> str:
    """A background that says how much, as a style."""
    r, g, b = MORE if score > 0 else LESS
    return f"background:rgba({r},{g},{b},{min(abs(score) / most, 1.0) * 0.85:.3f})"


def bar(score: float, most: float, signed: bool = True) -> str:
    """A number as a bar that grows from the middle, or from the left where none is below zero."""
    width = 100 * min(abs(score) / (most or 1.0), 1.0) / (2 if signed else 1)
    left = 0 if not signed else 50 if score >= 0 else 50 - width
    r, g, b = (MORE if score > 0 else LESS) if signed else MAP
    return f'<div class="bar"><div style="left:{left:.1f}%;width:{width:.1f}%;background:rgb({r},{g},{b})"></div></div>'


def curve(points: Sequence[tuple[str, float]], unit: str, low: float = 0.0, high: float = 1.0) -> str:
    """Numbers by name as a line, from the first to the last."""
    w, h, left, top = 560, 150, 46, 12
    step = w / max(1, len(points) - 1)

    def y(v: float) -> float:
        return top + h * (1 - (min(max(v, low), high) - low) / ((high - low) or 1.0))

    at = [(left + i * step, y(v)) for i, (_, v) in enumerate(points)]
    every = max(1, -(-len(points) // 16))
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{y_:.1f}" r="3"><title>{escape(name)}: {v:.4f}</title></circle>'
        for (x, y_), (name, v) in zip(at, points, strict=True)
    )
    names = "".join(
        f'<text x="{at[i][0]:.1f}" y="{top + h + 16}" text-anchor="middle">{escape(points[i][0])}</text>'
        for i in range(0, len(points), every)
    )
    axis = "".join(
        f'<line class="axis" x1="{left}" x2="{left + w}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.3g}</text>'
        for v in (low, (low + high) / 2, high)
    )
    line = " ".join(f"{x:.1f},{y_:.1f}" for x, y_ in at)
    return (
        f'<svg viewBox="0 0 {left + w + 20} {top + h + 40}" width="{left + w + 20}" role="img" '
        f'aria-label="{escape(unit)}">{axis}<polyline points="{line}"/>{marks}{names}'
        f'<text x="{left + w / 2}" y="{top + h + 34}" text-anchor="middle">{escape(unit)}</text></svg>'
    )


def heat(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], unit: str, cell: tuple[int, int] = (15, 15)
) -> str:
    """A map: the largest number has the strongest colour, zero none.

    Args:
      values: `[rows, columns]`, none below zero.
      rows: names; an empty one is not written.
      columns: names, written upright.
      unit: what the numbers are.
      cell: width and height of a number.
    """
    most = float(values.max()) or 1.0
    n, m = values.shape
    left = 10 + 7 * max((min(len(r), 28) for r in rows), default=0)
    top = 10 + 7 * max((min(len(c), 14) for c in columns), default=0)
    (a, b), (w, h) = cell, (m * cell[0], n * cell[1])
    caption = f"{unit}; strongest: {most:.3g}"
    width = left + max(w, 6 * len(caption)) + 4
    right = "".join(
        f'<text x="{left - 6}" y="{top + i * b + b * 0.75:.1f}" text-anchor="end">{escape(_short(r, 28))}</text>'
        for i, r in enumerate(rows)
        if r
    )
    up = "".join(
        f'<text transform="translate({left + j * a + a * 0.72:.1f} {top - 5}) rotate(-90)">'
        f"{escape(_short(c, 14))}</text>"
        for j, c in enumerate(columns)
        if c
    )
    return (
        f'<div class="wide"><svg viewBox="0 0 {width} {top + h + 22}" width="{width}" '
        f'height="{top + h + 22}" role="img" aria-label="{escape(unit)}">'
        f'<rect class="frame" x="{left}" y="{top}" width="{w}" height="{h}"/>'
        f'<image x="{left}" y="{top}" width="{w}" height="{h}" preserveAspectRatio="none" '
        f'href="{_png(values / most)}"/>'
        f'{right}{up}<text x="{left}" y="{top + h + 15}">{escape(caption)}</text></svg></div>'
    )


def _short(text: str, n: int) -> str:
    text = text.replace("\n", "⏎")
    return text if len(text) <= n else text[: n - 1] + "…"


def _png(share: np.ndarray) -> str:
    """Shares from 0 to 1 as an image, a dot each, in an address of its own."""
    from matplotlib.image import imsave

    rgba = np.empty((*share.shape, 4), np.uint8)
    rgba[..., :3], rgba[..., 3] = MAP, np.clip(share, 0, 1) * 255
    file = io.BytesIO()
    imsave(file, rgba, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
