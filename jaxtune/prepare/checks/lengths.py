"""Rows that are too long for the model, or far from the others' length."""

import numpy as np

from jaxtune.prepare.finding import Finding, Look
from jaxtune.prepare.rows import Table

_FAR = 3.5  # robust z-score beyond which a length is an outlier (Iglewicz and Hoaglin, 1993)


def too_long(table: Table, look: Look) -> Finding:
    """Rows of more tokens than fit, by the model's own tokenizer."""
    title = f"rows have more than {look.max_length} tokens"
    if look.tokens is None:
        return Finding(title, {}, remarks=("no tokenizer was given (--model), so tokens are not counted",))
    lengths = [look.tokens(table, row) for row in table.rows]
    detail = {i: f"{n} tokens" for i, n in enumerate(lengths) if n > look.max_length}
    remarks: tuple[str, ...] = ()
    if lengths:
        middle, high = np.percentile(lengths, [50, 99])
        remarks = (f"tokens of a row: median {middle:.0f}, 99 % within {high:.0f}, longest {max(lengths)}",)
    return Finding(title, detail, "remove" if detail else "none", "remove them; they would be cut" if detail else "",
                   remarks=remarks, values=lengths, unit="tokens of a row")  # fmt: skip


def outliers(table: Table, look: Look) -> Finding:
    """Rows whose length is far from the others', by a robust z-score of its logarithm."""
    lengths = [sum(map(len, table.texts(row.raw))) for row in table.rows]
    detail: dict[int, str] = {}
    if len(lengths) >= 10:
        x = np.log1p(lengths)
        spread = np.median(np.abs(x - np.median(x)))
        if spread > 0:
            z = 0.6745 * (x - np.median(x)) / spread
            detail = {i: f"{lengths[i]} characters" for i in np.flatnonzero(np.abs(z) > _FAR).tolist()}
    return Finding("rows are much shorter or longer than the others", detail, "remove" if detail else "none",
                   "remove them" if detail else "", values=lengths, unit="characters of a row")  # fmt: skip
