"""What a head says of rows, and how right it is: predictions and the scores of its task.

Dimensions: B batch, T time, S segments of a row, C outputs of the head, n tokens of an example.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxtune.data import heads
from jaxtune.data.examples import Record
from jaxtune.data.heads import HeadSettings
from jaxtune.data.pipeline import Batch, Batches, Rows
from jaxtune.metrics import classification, language, regression, spans, squad
from jaxtune.metrics.base import Scores
from jaxtune.objectives.heads import last_logits
from jaxtune.training import Apply
from jaxtune.weights import Array

Logits = Callable[[Any, Mapping[str, Array]], Array]
OF_TEXTS = ("classification", "regression")  # heads that read the last token of a text; the others read every token
METRICS: Mapping[str, str] = {  # the score by which a task is known
    "classification": "accuracy", "regression": "spearman", "token_classification": "f1", "span_qa": "f1",
}  # fmt: skip


def metric_of(s: HeadSettings) -> str:
    """The score by which a head is known."""
    return "f1_macro" if s.multi else METRICS[s.objective]


def make_logits(apply: Apply, objective: str) -> Logits:
    """The head's outputs for a batch, float32: `[B, S, C]` of texts, `[B, T, C]` of tokens."""
    if objective in OF_TEXTS:
        return lambda weights, batch: last_logits(apply(weights, batch), batch)[0]
    return lambda weights, batch: apply(weights, batch).logits()


def outputs(
    logits: Logits,
    weights: Any,
    rows: Rows,
    batch_size: int,
    put: Callable[[Batch], Mapping[str, Array]],
    objective: str,
) -> list[np.ndarray]:
    """The head's outputs for each example of the rows, in their order: `[C]` of a text, `[n, C]` of tokens."""
    out: list[Any] = [None] * len(rows.examples)
    for batch in Batches(rows, batch_size, seed=None, row_count=len(rows)):
        values = jax.device_get(logits(weights, put(batch)))
        for i, row in enumerate(batch.rows.tolist()):
            at = 0
            for k, example in enumerate(rows.rows[row] if row >= 0 else ()):
                n = len(rows.examples[example].ids)
                out[example] = values[i, k] if objective in OF_TEXTS else values[i, at : at + n]
                at += n
    return out


def predictions(s: HeadSettings, tokenizer: Any, records: Sequence[Record], found: Iterator[Any]) -> list[dict]:
    """A row for each record: what the head says, how sure it is, and what is right, where that is known.

    `found` are the outputs of the records' examples, in their order.
    """
    return [_prediction(s, tokenizer, r, found) for r in records]


def _prediction(s: HeadSettings, tokenizer: Any, record: Record, found: Iterator[np.ndarray]) -> dict[str, Any]:
    row = record.row
    if s.objective == "span_qa":
        windows = heads.windows(record, tokenizer, s)
        text, sure = heads.answer(record, windows, [next(found) for _ in windows], len(s.labels) > 1)
        right = row.get("answers")
        return {"id": row.get("id"), "prediction": text, "score": sure, "reference": right and right["text"]}
    if s.objective == "token_classification":
        words, right, _, _ = heads.tags(record)
        _, firsts = heads.first_tokens(record, tokenizer, s)
        best = next(found).argmax(-1) if any(at >= 0 for at in firsts) else None
        tags = [s.labels[best[at]] if best is not None and at >= 0 else "O" for at in firsts]
        given = row.get("tags") is not None or row.get("spans") is not None
        return {"tokens": words, "prediction": tags, "reference": right if given else None}
    logits_C, right = next(found), row.get("label")
    if s.objective == "regression":
        return {"text": heads.text_of(record), "prediction": float(logits_C[0]), "reference": right}
    p_C = 1 / (1 + np.exp(-logits_C)) if s.multi else np.exp(logits_C - logits_C.max())
    p_C = p_C if s.multi else p_C / p_C.sum()
    label: Any = [n for n, p in zip(s.labels, p_C, strict=True) if p > 0.5] if s.multi else s.labels[int(p_C.argmax())]
    likely = {n: round(float(p), 6) for n, p in zip(s.labels, p_C, strict=True)}
    return {"text": heads.text_of(record), "prediction": label, "probabilities": likely, "reference": right}


def score(s: HeadSettings, rows: Sequence[Mapping[str, Any]], language: str = "en") -> Scores:
    """The task's scores of predictions that have references."""
    said, right = [r["prediction"] for r in rows], [r["reference"] for r in rows]
    if s.objective == "regression":
        return regression.score(said, right)
    if s.objective == "token_classification":
        return spans.score(said, right)
    if s.objective == "span_qa":
        by_id = {str(i): r for i, r in enumerate(rows)}  # ids may be missing, or twice
        return squad.score(
            {i: r["prediction"] for i, r in by_id.items()},
            {i: r["reference"] or [] for i, r in by_id.items()},
            language,
        )
    if s.multi:
        several = [[r] if isinstance(r, str) else list(r) for r in right]
        return classification.score_multilabel([set(p) for p in said], [set(r) for r in several], s.labels)
    return classification.score(said, right, s.labels)


def evaluate(
    s: HeadSettings, tokenizer: Any, records: Sequence[Record], found: Sequence[np.ndarray]
) -> tuple[Scores, list[dict]]:
    """Scores of the outputs for records that say what is right, and the predictions."""
    rows = predictions(s, tokenizer, records, iter(found))
    contexts = (r.row["context"] for r in records) if s.objective == "span_qa" else ()
    return score(s, rows, language.of(contexts) if s.objective == "span_qa" else "en"), rows


def baseline(s: HeadSettings, records: Sequence[Record]) -> tuple[str, Scores] | None:
    """The scores of who does not look: their commonest label, their mean, no entity, the whole context."""
    if s.multi:
        return None
    if s.objective == "span_qa":
        rows = [{"prediction": r.row["context"], "reference": r.row["answers"]["text"]} for r in records]
        return "the context, copied", score(s, rows, language.of(r.row["context"] for r in records))
    if s.objective == "token_classification":
        right = [heads.tags(r)[1] for r in records]
        return "no tag at all", spans.score([["O"] * len(r) for r in right], right)
    labels = [r.row["label"] for r in records]
    if s.objective == "regression":
        return "the mean", regression.score([float(np.mean(labels))] * len(labels), labels)
    most = max(sorted(set(labels)), key=labels.count)
    return f"always {most}", classification.score([most] * len(labels), labels, s.labels)
