"""`jaxtune preview`: rows as the model will see them, which tokens are trained on, and what became of the data."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtune.config import Config, Mesh
from jaxtune.data import encode
from jaxtune.data.encode import Encoded
from jaxtune.data.pipeline import Rows
from jaxtune.errors import UserError
from jaxtune.job import Job, prepare
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


def prepared(c: Config) -> Job:
    """The run of a config before its weights are read, whatever devices it is for.

    Raises:
      UserError: as `job.prepare`; or the training set is a stream.
    """
    if c.data.streaming:
        raise UserError("data.streaming: a preview reads all rows; give data.streaming=false too")
    return prepare(c.model_copy(update={"mesh": Mesh()}))


def draw(job: Job, n: int, seed: int) -> list[Shown]:
    """Rows of the training set at random, with what trains marked."""
    data = _rows(job)
    chosen = np.random.default_rng(seed).permutation(len(data))[:n]
    out = []
    for i in sorted(chosen.tolist()):
        found = [_marked(job, data.examples[k]) for k in data.rows[i]]
        out.append(Shown(i, found, [data.origins[k] for k in data.rows[i]]))
    return out


def _rows(job: Job) -> Rows:
    assert isinstance(job.data.train, Rows)  # `prepared` refuses streams
    return job.data.train


def _marked(job: Job, e: Encoded) -> Encoded:
    """An example without virtual tokens, its mask on what trains: the tokens that are predicted, the words that have
    a tag, the answer's span. Under a head for whole texts there is none."""
    virtual = job.blueprint.method.virtual
    mask = e.mask.copy()
    if "label_S" in e.columns:
        mask[:] = False
    elif "start_S" in e.columns:
        start, end = int(e.columns["start_S"]), int(e.columns["end_S"])
        mask[:] = False
        mask[start : end + 1] = start > 0  # the first token stands for no answer
    elif "label_T" not in e.columns:
        mask |= job.config.objective == "pretrain"
        mask[0] = False  # there is nothing to predict it from
    columns = {k: x[virtual:] if k.endswith("_T") else x for k, x in e.columns.items()}
    return Encoded(e.ids[virtual:], mask[virtual:], columns)


def about(job: Job, template: str) -> list[tuple[str, str]]:
    """What holds of the whole training set."""
    data = _rows(job)
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


def labels(job: Job, e: Encoded) -> list[tuple[str, str]]:
    """What an example has beside tokens and mask: its label by name, or the places of its answer."""
    names, found = job.data.labels, {k: np.asarray(x) for k, x in e.columns.items() if not k.endswith("_T")}
    if "label_S" not in found or job.config.objective == "regression":
        return [(k.removesuffix("_S"), str(x)) for k, x in found.items()]
    x = found["label_S"]
    chosen = [names[int(x)]] if x.ndim == 0 else [n for n, there in zip(names, x, strict=True) if there]
    return [("label", ", ".join(chosen) or "none")]


def html(job: Job, rows: Sequence[Shown]) -> str:
    """The rows as a page: tokens in borders, trained ones coloured, examples of a row one below the other."""
    body = [page.table(("", ""), about(job, template_of(job)))]
    body += [f"<p>{page.escape(r)}</p>" for r in job.data.remarks]
    body.append('<p><span class="t on">trained on</span> <span class="t">seen only</span></p>')
    lengths = [len(e.ids) for e in _rows(job).examples]
    body.append(page.histogram(lengths, "tokens of an example"))
    for row in rows:
        body.append(f"<h2>row {row.number}: {row.tokens} tokens, {len(row.examples)} examples</h2>")
        for e, origin in zip(row.examples, row.origins, strict=True):
            beside = "".join(f"; {page.escape(k)} = {page.escape(v)}" for k, v in labels(job, e))
            trained = int(e.mask.sum())
            body.append(
                f'<p class="quiet">{page.escape(origin)}: {len(e.ids)} tokens, {trained} trained on{beside}</p>'
            )
            body.append(f'<div class="s">{"".join(_token(job, e, i) for i in range(len(e.ids)))}</div>')
    return page.page("Preview of the training data", "\n".join(body))


def _token(job: Job, e: Encoded, i: int) -> str:
    tag = f", {job.data.labels[int(e.columns['label_T'][i])]}" if "label_T" in e.columns and e.mask[i] else ""
    text = page.escape(token_text(job.tokenizer, int(e.ids[i]))).replace("\n", "↵<br>")
    return f'<span class="t{" on" if e.mask[i] else ""}" title="{page.escape(f"{int(e.ids[i])}{tag}")}">{text}</span>'


def token_text(tokenizer: Any, token: int) -> str:
    """A token as text; a piece of a character as the tokenizer writes it."""
    text = tokenizer.decode([token])
    if text and "\ufffd" not in text:
        return text
    return str(tokenizer.convert_ids_to_tokens(token))


def runs(job: Job, row: Shown) -> list[tuple[str, list[tuple[str, bool]]]]:
    """A row for the terminal: of each example a line about it, and its text in runs."""
    out = []
    for e, origin in zip(row.examples, row.origins, strict=True):
        beside = "".join(f"; {k} = {v}" for k, v in labels(job, e))
        line = f"row {row.number}, {origin}: {len(e.ids)} tokens, {int(e.mask.sum())} trained on{beside}"
        out.append((line, encode.visible(job.tokenizer, e.ids, e.mask)))
    return out
