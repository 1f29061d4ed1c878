"""Accuracy, precision, recall, F1 and Matthews' correlation of labels, by scikit-learn; between 0 and 1.

A predicted name that is no label is a wrong prediction: it lowers accuracy and recall and stands in the last column of
the confusion matrix.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.errors import UserError, nearest
from jaxtune.metrics.base import Scores

OTHER = "(other)"  # what was predicted instead of a label


def score(predictions: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> Scores:
    """Scores of one label each: `details` holds a row per class and the confusion matrix, references down.

    >>> score(["a", "b", "a", "a"], ["a", "b", "b", "a"], ["a", "b"]).values["accuracy"]
    0.75

    Raises:
      UserError: a reference is no label, or there is nothing to score.
    """
    from sklearn import metrics

    y_pred, y_true, names = list(predictions), list(references), list(labels)
    _check([{y} for y in y_true], len(y_pred), names)
    matrix = _confusion(y_pred, y_true, names)
    single = len({*y_pred, *y_true}) == 1  # no correlation can be measured then
    values = {
        "accuracy": float(metrics.accuracy_score(y_true, y_pred)),
        **_averages(y_true, y_pred, names),
        "mcc": 0.0 if single else float(metrics.matthews_corrcoef(y_true, y_pred)),
    }
    columns = [*names, OTHER] if matrix.shape[1] > len(names) else names
    details = {
        "classes": _classes(y_true, y_pred, names),
        "confusion": {"references": names, "predictions": columns, "counts": matrix.tolist()},
    }
    return Scores(values, details, {"accuracy": [float(p == r) for p, r in zip(y_pred, y_true, strict=True)]})


def score_multilabel(
    predictions: Sequence[AbstractSet[str]], references: Sequence[AbstractSet[str]], labels: Sequence[str]
) -> Scores:
    """Scores of sets of labels: F1 over all (micro), labels (macro), rows (samples), and the share of equal sets.

    Predicted names that are no labels are counted in `details`; a set that holds one is not equal.

    Raises:
      UserError: a reference is no label, or there is nothing to score.
    """
    from sklearn.preprocessing import MultiLabelBinarizer

    names = list(labels)
    _check(references, len(predictions), names)
    known = set(names)
    binary = MultiLabelBinarizer(classes=names)
    y_pred = binary.fit_transform([set(p) & known for p in predictions])
    y_true = binary.fit_transform([set(r) for r in references])
    equal = [float(set(p) == set(r)) for p, r in zip(predictions, references, strict=True)]
    numbers = list(range(len(names)))
    values = {"exact_match": float(np.mean(equal)), **_averages(y_true, y_pred, numbers)}
    values["f1_samples"] = _prf(y_true, y_pred, numbers, "samples")[2]
    rows = _classes(y_true, y_pred, numbers)
    details = {
        "classes": {names[i]: rows[i] for i in numbers},
        "unknown": sum(len(set(p) - known) for p in predictions),
    }
    return Scores(values, details, {"exact_match": equal})


def draw(scores: Scores, file: Path) -> None:
    """The confusion matrix as a picture, each row shaded by its shares."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    confusion = scores.details["confusion"]
    counts = np.array(confusion["counts"])
    rows, columns = counts.shape
    size = min(30.0, 2.5 + 0.4 * max(rows, columns))
    figure = Figure(figsize=(size, size), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    # names are data: a $ in them begins no formula
    axes.set_xticks(range(columns), [x.replace("$", r"\$") for x in confusion["predictions"]], rotation=90)
    axes.set_yticks(range(rows), [x.replace("$", r"\$") for x in confusion["references"]])
    axes.set_xlabel("predicted")
    axes.set_ylabel("reference")
    for i, j in zip(*np.nonzero(counts), strict=True) if columns <= 30 else ():
        dark = counts[i, j] > counts[i].sum() / 2
        axes.text(j, i, f"{counts[i, j]}", ha="center", va="center", color="white" if dark else "black", fontsize=8)
    figure.savefig(file)


def _check(references: Sequence[AbstractSet[str]], n_predictions: int, labels: list[str]) -> None:
    if len(references) != n_predictions:
        raise ValueError(f"{n_predictions} predictions for {len(references)} references")
    if not references:
        raise UserError("classification: there are no rows to score; give data with at least one")
    if unknown := sorted(set().union(*references) - set(labels)):
        raise UserError(f"label {unknown[0]!r} of the data is none of data.labels{nearest(unknown[0], labels)}")


def _confusion(y_pred: list[str], y_true: list[str], names: list[str]) -> np.ndarray:
    at = {name: i for i, name in enumerate(names)}
    columns = len(names) + any(p not in at for p in y_pred)
    matrix = np.zeros((len(names), columns), np.int64)
    for p, r in zip(y_pred, y_true, strict=True):
        matrix[at[r], at.get(p, len(names))] += 1
    return matrix


def _averages(y_true: Any, y_pred: Any, labels: list) -> dict[str, float]:
    values: dict[str, float] = {}
    for average in ("macro", "micro", "weighted"):
        found = _prf(y_true, y_pred, labels, average)
        values |= {f"{k}_{average}": v for k, v in zip(("precision", "recall", "f1"), found, strict=True)}
    return values


def _prf(y_true: Any, y_pred: Any, labels: list, average: str) -> tuple[float, ...]:
    from sklearn.metrics import precision_recall_fscore_support

    found = precision_recall_fscore_support(y_true, y_pred, labels=labels, average=average, zero_division=0)
    return tuple(float(x) for x in found[:3])


def _classes(y_true: Any, y_pred: Any, labels: list) -> dict[Any, dict[str, float]]:
    from sklearn.metrics import precision_recall_fscore_support

    found = precision_recall_fscore_support(y_true, y_pred, labels=labels, average=None, zero_division=0)
    names = ("precision", "recall", "f1", "rows")
    return {
        label: {k: float(v) for k, v in zip(names, row, strict=True)}
        for label, row in zip(labels, zip(*found, strict=True), strict=True)
    }
