"""A report as one page that stands alone: no script, nothing loaded, all that comes from data escaped."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.explaining import figures
from jaxtune.prepare.page import escape

Tree = Mapping[str, Any]
_METHODS = {
    "integrated_gradients": "Integrated gradients",
    "gradient_x_input": "Gradient × input",
    "occlusion": "Occlusion",
}
_WORDS = 15  # of each input, that the table lists
_PLACES = 16  # of the lens, from the end
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.55 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid #8886; }
h3 { font-size: 1.05rem; margin-bottom: .2rem; }
nav ul { padding-left: 1.2rem; } .quiet { opacity: .75; font-size: .92em; max-width: 60rem; }
table { border-collapse: collapse; margin: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .2rem .6rem; border-bottom: 1px solid #8884; }
td { overflow-wrap: anywhere; } td.place { white-space: nowrap; }
td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #8884; padding: .5rem; max-height: 14rem;
  overflow: auto; }
.strip { line-height: 2; margin: .2rem 0 .8rem; overflow-wrap: anywhere; }
.tok { white-space: pre-wrap; border-radius: 3px; padding: .1rem 0; }
.bar { position: relative; width: 9rem; height: .8rem; margin-top: .35rem; background: #8882; }
.bar div { position: absolute; top: 0; bottom: 0; }
.wide { overflow-x: auto; } .lens td { white-space: pre; padding: .15rem .35rem; font-size: .85em; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; white-space: pre; } svg .axis { stroke: #8884; }
svg polyline { fill: none; stroke: rgb(70,130,200); stroke-width: 2; } svg circle { fill: rgb(70,130,200); }
svg .frame { fill: none; stroke: #8888; } svg image { image-rendering: pixelated; }
.warn { border-left: 4px solid rgb(220,90,60); padding: .2rem .8rem; }
"""


def html(report: Tree) -> str:
    """The whole page."""
    sections = [("about", "What was asked", _about(report))]
    sections += [
        (f"input-{i}", f"{_short(x['name'])}: {x['answer']!r}", _input(x)) for i, x in enumerate(report["inputs"])
    ]
    if "changes" in report:
        sections.append(("changes", f"What tuning changed, from {report['base']}", _changes(report)))
    if "influence" in report:
        sections.append(("influence", "Which training rows made it", _influence(report)))
    toc = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{escape(title)}</h2>\n{text}</section>\n' for key, title, text in sections)
    title = f"{report['model']}, explained"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"<nav><ul>{toc}</ul></nav>\n{body}</body>\n</html>\n"
    )


def _short(origin: str) -> str:
    """Where a row stands, without the folder."""
    return origin.rpartition("/")[2]


def _place(origin: str) -> str:
    return f'<td class="place">{escape(_short(origin))}</td>'


def _quiet(text: str) -> str:
    return f'<p class="quiet">{text}</p>\n'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already; those of numbers stand to the right."""
    cells = "".join(
        "<tr>" + "".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in row) + "</tr>\n" for row in rows
    )
    heads = "".join(f"<th>{escape(h)}</th>" for h in head)
    return f'<div class="wide"><table class="{kind}">\n<tr>{heads}</tr>\n{cells}</table></div>\n'


def _number(value: float, form: str = "+.4f") -> str:
    return f'<td class="n">{value:{form}}</td>'


def _about(report: Tree) -> str:
    s = report["settings"]
    rows = [
        ("model", report["model"] + (f" with {report['adapter']}" if report["adapter"] else "")),
        ("tuned from", report["base"] or "not looked at"),
        ("kind", report["head"]),
        (
            "value explained",
            "log-probability (natural) of the answer" if s["value"] == "logprob" else "logit of the answer",
        ),
        ("baseline", s["baseline"]),
        ("computed in", s["dtype"]),
        ("made by", report["made_by"]),
    ]
    told = "".join(f'<p class="warn">{escape(r)}</p>' for r in report["remarks"])
    return told + _table(("", ""), [(escape(k), escape(v)) for k, v in rows])


# --- one input --------------------------------------------------------------------------------------------------------


def _input(x: Tree) -> str:
    likely = ", ".join(f"{escape(repr(name))} {p:.3f}" for name, p in x["likeliest"])
    right = f" The row's own answer is {escape(repr(x['reference']))}." if x["reference"] is not None else ""
    out = [f"<pre>{escape(x['text'])}</pre>", f"<p>Likeliest: {likely}.{right}</p>"]
    if "attributions" in x:
        out.append(_attributions(x))
    if "lens" in x:
        out.append(_lens(x))
    if "attention" in x:
        out.append(_attention(x))
    return "\n".join(out)


def _attributions(x: Tree) -> str:
    a = x["attributions"]
    out = [f"<h3>What the answer {escape(repr(x['answer']))} comes from</h3>"]
    out.append(
        _quiet(
            "Green tokens speak for the answer, red ones against it; stronger is more, within a line. The three "
            "methods ask different questions and are worth most where they agree. Integrated gradients share out the "
            "whole difference between text and baseline; gradient × input is the slope at the text alone; occlusion is "
            "what is lost when one token alone is replaced. Special tokens are left as they are and have none. None of "
            "them says that a token is a cause on its own: two tokens that say the same hide each other."
        )
    )
    for key, title in _METHODS.items():
        out.append(f"<b>{title}</b>{figures.token_strip(x['tokens'], a['scores'][key])}")
    how = "add up to" if a["complete"] else "should add up to, and do not,"
    out.append(
        f"<p>Value {a['value']:.4f}, of the baseline {a['baseline_value']:.4f}: integrated gradients over {a['steps']} "
        f"points {how} the difference {a['value'] - a['baseline_value']:+.4f}, within "
        f"{100 * a['completeness_error']:.2f} %.</p>"
    )
    order = sorted(range(len(x["words"])), key=lambda i: -abs(a["by_word"]["integrated_gradients"][i]))[:_WORDS]
    most = {key: max(map(abs, a["by_word"][key]), default=0.0) for key in _METHODS}
    rows = [
        [escape(x["words"][i]["text"].replace("\n", "⏎"))]
        + [c for k in _METHODS for c in (_number(a["by_word"][k][i]), figures.bar(a["by_word"][k][i], most[k]))]
        for i in order
    ]
    heads = ["word", *(h for title in _METHODS.values() for h in (title, ""))]
    return (
        "\n".join(out)
        + _table(heads, rows)
        + _quiet("Of words of several tokens: their sum; a token of two words counts for the first.")
    )


def _lens(x: Tree) -> str:
    lens, tokens = x["lens"], x["tokens"]
    L = len(lens["answer"])
    first = max(0, len(tokens) - _PLACES)
    rows = []
    for layer in reversed(range(L)):
        cells = [f"{layer + 1}"]
        for place in lens["top"][layer][first:]:
            title = ", ".join(f"{name!r} {p:.3f}" for name, p in place)
            name, p = place[0]
            shown = escape(name[:12].replace("\n", "⏎"))
            cells.append(f'<td style="{figures.colour(p, 1.0)}" title="{escape(title)}">{shown}</td>')
        rows.append(cells)
    heads = ["layer", *(t[:12].replace("\n", "⏎") for t in tokens[first:])]
    what = repr(x["answer_tokens"][0])
    points = [(str(i + 1), p) for i, p in enumerate(lens["answer"])]
    more = f" The last {_PLACES} of {len(tokens)} tokens are shown." if first else ""
    how = _quiet(
        "After each layer the last norm and the head are put on what there is (nostalgebraist, 2020). The curve is the "
        f"probability of {escape(what)} where the answer is given; the table shows the likeliest output after each "
        f"token.{more} The last layer is what the model says. Early layers were never trained to be read this way, so "
        "what they seem to say may be noise."
    )
    shown = figures.curve(points, f"layer; probability of {what}") + _table(heads, rows, "lens")
    return f"<h3>Logit lens: what each layer would say</h3>{how}{shown}"


def _attention(x: Tree) -> str:
    tokens, a = x["tokens"], x["attention"]
    from_last = np.array(a["from_last"])
    L, N, T = from_last.shape
    rows = [f"layer {i + 1}" if n == 0 else "" for i in range(L) for n in range(N)]
    rollout = np.array(a["rollout"])
    return (
        "<h3>Attention</h3>"
        + _quiet(
            "Where each head looks from the last token, a line a head. Most heads look at the first token when they "
            "have nothing to do. Looking is not the same as using: what is looked at may be thrown away."
        )
        + figures.heat(
            from_last.reshape(L * N, T),
            rows,
            tokens,
            f"{N} heads in each of {L} layers",
            (15, max(1, min(12, 900 // (L * N)))),
        )
        + _quiet(
            "Roll-out (Abnar and Zuidema, 2020): how much of each place (a line) comes from each token (a column), "
            "through all layers, were heads alike and half of each layer passed on. It knows nothing of the answer."
        )
        + figures.heat(rollout, tokens, tokens, "share", (11, 11))
    )


# --- what tuning changed ----------------------------------------------------------------------------------------------


def _changes(report: Tree) -> str:
    c, out = report["changes"], []
    if c["virtual_tokens"]:
        out.append(f"<p>{c['virtual_tokens']} virtual tokens stand before every text; the weights are not theirs.</p>")
    if not c["weights"]:
        out.append("<p>No weight that both models have is other than it was.</p>")
    else:
        out.append(_weights(c["weights"]))
    if "cka" in c:
        points = [(str(i + 1), v) for i, v in enumerate(c["cka"])]
        low = min(0.9, *c["cka"]) if c["cka"] else 0.0
        out.append("<h3>Activations: how alike they still are</h3>")
        out.append(
            _quiet(
                "Linear CKA (Kornblith and others, 2019) between the base's and the tuned model's activations after "
                f"each layer, over the {c['cka_tokens']} tokens of the texts above, special ones left out: 1 is the "
                "same but for a rotation and a scale. With fewer tokens than a layer is wide it lies too near to 1."
            )
        )
        out.append(figures.curve(points, "layer; CKA", low))
    if "likelier" in c:
        out.append(_next_tokens(report))
    for name, rows in c["tables"].items():
        out.append(f"<h3>Rows of {escape(name)} that changed most</h3>")
        out.append(_table(("token", "change, relative"), [[escape(repr(t)), _number(v, ".4f")] for t, v in rows]))
    return "\n".join(out)


def _weights(weights: Sequence[Tree]) -> str:
    layers: dict[str, dict[int, Tree]] = {}
    for w in weights:
        parts = w["name"].split("/")
        if parts[0] == "layers":
            layers.setdefault("/".join(parts[2:]).removesuffix("/weight"), {})[int(parts[1])] = w
    out = ["<h3>Weights: where the update is</h3>"]
    out.append(
        _quiet(
            "The Frobenius norm of what tuning added to a matrix, relative to that of the matrix; and its effective "
            "rank (Roy and Vetterli, 2007): of how many equally strong directions it might be made. A large update "
            "need not matter, nor a small one be harmless: the sections on texts say what they do."
        )
    )
    if layers:
        last = max(max(found) for found in layers.values()) + 1
        for key, unit in (("relative", "norm of the update, relative"), ("rank", "effective rank of the update")):
            values = np.array([[found.get(i, {}).get(key) or 0.0 for i in range(last)] for found in layers.values()])
            if values.any():
                columns = [str(i) if i % (1 + last // 40) == 0 else "" for i in range(last)]
                out.append(figures.heat(values, list(layers), columns, f"{unit}, by layer", (22, 18)))
    most = sorted(weights, key=lambda w: -w["relative"])[:12]
    rows = [
        [escape(w["name"]), _number(w["norm"], ".4g"), _number(w["relative"], ".4g"),
         "" if w["rank"] is None else _number(w["rank"], ".2f"), "" if w["full"] is None else _number(w["full"], "d")]
        for w in most
    ]  # fmt: skip
    heads = ("largest, relative", "norm", "relative", "effective rank", "at most")
    more = f"<p>{len(weights):,} weights changed.</p>"
    return "\n".join(out) + _table(heads, rows) + more


def _next_tokens(report: Tree) -> str:
    c = report["changes"]
    out = ["<h3>Next tokens: what became likelier</h3>"]
    out.append(
        _quiet(
            "The mean, over all places of the texts above, of what the probability of a token gained or lost; and the "
            "texts, coloured by how much the next token's distribution after each token differs from the base's "
            "(Kullback and Leibler's divergence); a token's title says what base and tuned model would go on with."
        )
    )
    out.append(_table(("token", "gain"), [[escape(repr(t)), _number(v)] for t, v in c["likelier"]]))
    for x, values, pairs in zip(report["inputs"], c["divergence"], c["next"], strict=True):
        notes = [f"{v:.3f} nats; base {a!r}, tuned {b!r}" for v, (a, b) in zip(values, pairs, strict=True)]
        out.append(figures.token_strip(x["tokens"], values, notes))
    return "\n".join(out)


def _influence(report: Tree) -> str:
    found = report["influence"]
    steps = ", ".join(str(c["step"]) for c in found["checkpoints"])
    out = [
        _quiet(
            "TracIn (Pruthi and others, 2020): of each training row, by how much a step on it would have lowered the "
            "loss of the answer (helpful, above 0) or raised it (harmful), added up over the checkpoints of steps "
            f"{steps} with their learning rates. It follows gradients alone, not what the optimiser made of them, and "
            "long rows weigh more. Harmful rows are worth a look: a wrong label, an outlier, or a row that is right of "
            "another kind."
        ),
        f"<p>{found['rows']:,} of {found['of']:,} training rows were looked at.</p>",
    ]
    for x, part in zip(report["inputs"], found["inputs"], strict=True):
        out.append(f"<h3>{escape(_short(x['name']))}: {escape(repr(x['answer']))}</h3>")
        for key in ("helpful", "harmful"):
            rows = [
                [
                    str(i + 1),
                    _number(r["score"], "+.3g"),
                    _place(r["origin"]),
                    escape(r["text"]),
                    escape(r["answer"]),
                ]
                for i, r in enumerate(part[key])
            ]
            out.append(
                _table(("", f"most {key}", "row", "text", "learned from it"), rows)
                if rows
                else f"<p>No row is {key}.</p>"
            )
    return "\n".join(out)
