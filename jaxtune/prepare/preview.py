"""`jaxtune preview`: rows as the model will see them, which tokens are trained on, and what became of the data."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtune.data import encode
from jaxtune.data.encode import Encoded
from jaxtune.job import Job
from jaxtune.prepare import page


@dataclasses.dataclass(frozen=True)
class Shown:
    """A row of the training set: its examples in order, each with where it came from."""

    number: int
    examples: Sequence[Encoded]
    origins: Sequence[str]

    @property
    def tokens(self) -> int:
        return sum(len(e.ids) for e in self.examples)


def draw(job: Job, n: int, seed: int) -> list[Shown]:
    """Rows of the training set at random, with all tokens trained on where the objective says so."""
    data = job.data.train
    chosen = np.random.default_rng(seed).permutation(len(data))[:n]
    virtual = job.blueprint.method.virtual
    out = []
    for i in sorted(chosen.tolist()):
        found = [_seen(data.examples[k], virtual, job.config.objective == "pretrain") for k in data.rows[i]]
        out.append(Shown(i, found, [data.origins[k] for k in data.rows[i]]))
    return out


def _seen(e: Encoded, virtual: int, whole: bool) -> Encoded:
    """Without virtual tokens, which are no text."""
    mask = np.ones_like(e.mask) if whole else e.mask
    columns = {k: x[virtual:] if k.endswith("_T") else x for k, x in e.columns.items()}
    return Encoded(e.ids[virtual:], mask[virtual:], columns)


def about(job: Job, template: str) -> list[tuple[str, str]]:
    """What holds of the whole training set."""
    data = job.data.train
    lengths = np.array([len(e.ids) for e in data.examples])
    return [
        ("objective", job.config.objective),
        ("chat template", template),
        ("examples", f"{len(lengths):,} of {lengths.min()} to {lengths.max()} tokens, median {np.median(lengths):.0f}"),
        ("trained on", f"{data.trained_tokens:,} of {data.tokens:,} tokens"),
        ("rows", f"{len(data):,}, at most {max(map(len, data.rows))} examples in one"),
    ]


def template_of(job: Job) -> str:
    """What the remarks say of the template."""
    prefix = "chat template: "
    return next((r.removeprefix(prefix) for r in job.data.remarks if r.startswith(prefix)), "none")


def labels(e: Encoded) -> list[tuple[str, str]]:
    """What an example has beside tokens and mask: labels, the span of an answer."""
    return [(name, _short(x)) for name, x in e.columns.items() if not name.endswith("_T")]


def html(job: Job, rows: Sequence[Shown]) -> str:
    """The rows as a page: tokens in borders, trained ones coloured, examples of a row one below the other."""
    tokenizer = job.tokenizer
    body = [page.table(("", ""), about(job, template_of(job)))]
    body += [f"<p>{page.escape(r)}</p>" for r in job.data.remarks]
    body.append('<p><span class="t on">trained on</span> <span class="t">seen only</span></p>')
    lengths = [len(e.ids) for e in job.data.train.examples]
    body.append(page.histogram(lengths, "tokens of an example"))
    for row in rows:
        body.append(f"<h2>row {row.number}: {row.tokens} tokens, {len(row.examples)} examples</h2>")
        for e, origin in zip(row.examples, row.origins, strict=True):
            beside = "".join(f"; {page.escape(k)} = {page.escape(v)}" for k, v in labels(e))
            trained = int(e.mask[1:].sum())
            body.append(
                f'<p class="quiet">{page.escape(origin)}: {len(e.ids)} tokens, {trained} trained on{beside}</p>'
            )
            body.append(f'<div class="s">{"".join(_token(tokenizer, e, i) for i in range(len(e.ids)))}</div>')
    return page.page("Preview of the training data", "\n".join(body))


def _token(tokenizer: Any, e: Encoded, i: int) -> str:
    own = "".join(f", {name} {_short(x[i])}" for name, x in e.columns.items() if name.endswith("_T"))
    trained = bool(e.mask[i]) and i > 0  # the first of an example is never predicted
    text = page.escape(token_text(tokenizer, int(e.ids[i]))).replace("\n", "↵<br>")
    return f'<span class="t{" on" if trained else ""}" title="{page.escape(f"{int(e.ids[i])}{own}")}">{text}</span>'


def token_text(tokenizer: Any, token: int) -> str:
    """A token as text; a piece of a character as the tokenizer writes it."""
    text = tokenizer.decode([token])
    if text and "\ufffd" not in text:
        return text
    return str(tokenizer.convert_ids_to_tokens(token))


def _short(x: Any) -> str:
    return np.array2string(np.asarray(x), threshold=20, separator=", ")


def runs(job: Job, row: Shown) -> list[tuple[str, list[tuple[str, bool]]]]:
    """A row for the terminal: of each example a line about it, and its text in runs."""
    out = []
    for e, origin in zip(row.examples, row.origins, strict=True):
        beside = "".join(f"; {k} = {v}" for k, v in labels(e))
        line = f"row {row.number}, {origin}: {len(e.ids)} tokens, {int(e.mask[1:].sum())} trained on{beside}"
        out.append((line, encode.visible(job.tokenizer, e.ids, e.mask)))
    return out
