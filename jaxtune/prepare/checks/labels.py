"""Labels: how often each stands, and which rows a simple classifier would confidently label otherwise."""

from collections import Counter
from typing import Any

import numpy as np

from jaxtune.prepare.finding import Finding, Look
from jaxtune.prepare.rows import Table, joined

_SURE = 5  # times that a label must be likelier than the given one to be proposed instead
_RARE = 5  # rows below which a label can hardly be learnt


def balance(table: Table, look: Look) -> Finding:
    """Labels of fewer than five rows, and how far the most frequent is from the rarest."""
    names = [table.name_of_label(row.raw) for row in table.rows]
    counts = Counter(n for n in names if n is not None)
    title = f"rows have a label that stands fewer than {_RARE} times"
    if not counts:
        return Finding(title, {})
    detail = {i: f"{n} ×{counts[n]}" for i, n in enumerate(names) if n is not None and counts[n] < _RARE}
    (most, n), (least, m) = counts.most_common()[0], counts.most_common()[-1]
    remarks = [f"{len(counts)} labels; {most!r} stands {n} times, {least!r} {m} times ({n / m:.1f} to 1)"]
    alike = Counter(" ".join(name.casefold().replace("_", " ").split()) for name in counts)
    for plain in sorted(k for k, c in alike.items() if c > 1):
        same = sorted(c for c in counts if " ".join(c.casefold().replace("_", " ").split()) == plain)
        remarks.append(f"labels differ by case or spaces alone: {', '.join(map(repr, same))}")
    if len(counts) == 1:
        remarks.append("there is only one label, so nothing can be learnt")
    return Finding(title, detail, "remove" if detail else "none", "remove them" if detail else "",
                   remarks=tuple(remarks), counts=dict(counts.most_common()))  # fmt: skip


def label_errors(table: Table, look: Look) -> Finding:
    """Candidates for wrong labels by confident learning (Northcutt et al., 2021).

    Each row is judged by a logistic regression on TF-IDF features that did not see it. A candidate is given another
    label with at least the probability that rows of that label get on average, and five times that of its own. Rows of
    several labels, and labels of fewer than three rows, are not judged.
    """
    title = "rows may have a wrong label"
    names = [table.name_of_label(row.raw) for row in table.rows]
    counts = Counter(n for n in names if n is not None)
    several = table.label is not None and any(isinstance(r.raw.get(table.label), list) for r in table.rows)
    fit = [i for i, n in enumerate(names) if n is not None and counts[n] >= 3]
    labels = sorted({str(names[i]) for i in fit})
    if several or len(labels) < 2 or len(fit) < 20:
        return Finding(title, {})
    texts = ["\n".join(map(joined, table.fields(table.rows[i].raw)[0])) for i in fit]
    y = np.searchsorted(labels, [str(names[i]) for i in fit])
    p = _held_out(texts, y, look.seed)
    if p is None:
        return Finding(title, {}, remarks=("the texts have no words to judge their labels by",))
    usual = np.array([p[y == k, k].mean() for k in range(len(labels))])
    guess, given = np.where(p >= usual, p, 0.0).argmax(1), p[np.arange(len(y)), y]
    wrong = (guess != y) & (p.max(1) >= usual[guess]) & (p[np.arange(len(y)), guess] >= _SURE * given)
    detail = {
        fit[k]: f"{labels[y[k]]}, rather {labels[guess[k]]} ({p[k, guess[k]]:.2f})" for k in np.flatnonzero(wrong)
    }
    right = float((p.argmax(1) == y).mean())
    remarks = (f"a simple classifier finds the label of {100 * right:.0f} % of the rows that it did not see",)
    return Finding(title, detail, "remove" if detail else "none", "remove them, after a look at each" if detail else "",
                   remarks=remarks)  # fmt: skip


def _held_out(texts: list[str], y: np.ndarray, seed: int) -> Any:
    """Probabilities [n, labels] of every row's labels by a classifier trained on other rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import SGDClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    # Characters too, so that scripts without spaces have features.
    words = r"(?u)\b\w\w+\b|[\u3040-\u30ff\u3400-\u9fff]"
    features = TfidfVectorizer(ngram_range=(1, 2), token_pattern=words, sublinear_tf=True, max_features=50_000)
    try:
        x = features.fit_transform(texts)
    except ValueError:  # an empty vocabulary
        return None
    # A logistic regression, fitted by stochastic gradients: as good here, and quick with many labels.
    model = SGDClassifier(loss="log_loss", alpha=1e-5, random_state=seed % 2**32)
    folds = StratifiedKFold(3, shuffle=True, random_state=seed % 2**32)
    return cross_val_predict(model, x, y, cv=folds, method="predict_proba")
