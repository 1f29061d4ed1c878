"""HTML pages that stand alone: no script, nothing loaded, all that comes from data escaped."""

import html
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem; border-bottom: 1px solid #8884; }
td { overflow-wrap: anywhere; white-space: pre-wrap; } td.n, th.n { text-align: right; white-space: nowrap; }
details { margin: .5rem 0; } summary { cursor: pointer; } .quiet { opacity: .7; }
svg { max-width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
svg rect { fill: #4477aa; }
.t { border: 1px solid #8886; border-radius: 3px; padding: 0 1px; white-space: pre-wrap; }
.on { background: #2a9d5c55; border-color: #2a9d5c; }
.s { border-left: 4px solid #4477aa; padding: .3rem .6rem; margin: .4rem 0; line-height: 1.9; overflow-wrap: anywhere; }
.s:nth-of-type(even) { border-left-color: #cc7711; }
"""


def escape(value: object) -> str:
    """Text as HTML shows it; lone surrogates, which no file can hold, as `�`.

    >>> escape("<script>")
    '&lt;script&gt;'
    """
    return html.escape(str(value).encode("utf-8", "replace").decode(), quote=True)


def page(title: str, body: str) -> str:
    """A whole page around a body that is HTML already."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n"
        "</body>\n</html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; numbers stand to the right."""
    cells = (
        "".join(f'<td class="n">{v:,}</td>' if isinstance(v, int) else f"<td>{escape(v)}</td>" for v in row)
        for row in rows
    )
    return (
        "<table>\n<tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr>\n"
        + "".join(f"<tr>{row}</tr>\n" for row in cells) + "</table>\n"
    )  # fmt: skip


def histogram(values: Sequence[float], unit: str, bins: int = 40) -> str:
    """How often which number stands, up to the 99th percentile; what is beyond is in the last bar."""
    x = np.asarray(values, float)
    if not len(x):
        return ""
    low, high = float(x.min()), max(float(np.percentile(x, 99)), float(x.min()) + 1)
    counts, _ = np.histogram(np.clip(x, low, high), bins=bins, range=(low, high))
    w, h, step = 640, 150, 640 / bins
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{h - h * n / counts.max():.1f}" width="{step - 1:.1f}" '
        f'height="{h * n / counts.max():.1f}"><title>{n} rows</title></rect>'
        for i, n in enumerate(counts.tolist())
    )
    right = f"{high:.0f}" + (f" (longest {x.max():.0f})" if x.max() > high else "")
    return (
        f'<svg viewBox="0 0 {w} {h + 20}" width="{w}" height="{h + 20}" role="img" aria-label="{escape(unit)}">{bars}'
        f'<text x="0" y="{h + 15}">{low:.0f}</text><text x="{w / 2}" y="{h + 15}" text-anchor="middle">'
        f'{escape(unit)}, median {np.median(x):.0f}</text><text x="{w}" y="{h + 15}" text-anchor="end">{right}</text>'
        "</svg>"
    )


def bars(counts: Mapping[str, int], limit: int = 30) -> str:
    """How often which name stands, the most frequent first."""
    shown = sorted(counts.items(), key=lambda kv: -kv[1])[:limit]
    if not shown:
        return ""
    most, left = shown[0][1], 220
    rows = "".join(
        f'<text x="{left - 6}" y="{18 * i + 13}" text-anchor="end">{escape(name[:34])}</text>'
        f'<rect x="{left}" y="{18 * i + 3}" width="{360 * n / most:.1f}" height="12"></rect>'
        f'<text x="{left + 360 * n / most + 5:.1f}" y="{18 * i + 13}">{n}</text>'
        for i, (name, n) in enumerate(shown)
    )
    more = f'<p class="quiet">{len(counts) - limit} more</p>' if len(counts) > limit else ""
    height = 18 * len(shown) + 4
    return f'<svg viewBox="0 0 640 {height}" width="640" height="{height}" role="img">{rows}</svg>{more}'
