"""Rows that say the same: exact and near duplicates, contradictions, and rows that also stand in another set."""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtune.prepare.finding import Finding, Look
from jaxtune.prepare.rows import LABELLED, Table, normal

_PERMUTATIONS = 64
_WINDOW = 5  # characters of a shingle
_MOST = 2000  # shingles kept of a text, those of the smallest hashes: a sample that is the same for like texts
_FACTORS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], np.uint64
)


def duplicates(table: Table, look: Look) -> Finding:
    """Rows whose question, answer and label stand in an earlier row, but for spaces."""
    first: dict[bytes, int] = {}
    detail = {}
    for i, row in enumerate(table.rows):
        j = first.setdefault(_digest(table.whole(row.raw)), i)
        if j != i:
            detail[i] = f"as {table.rows[j].origin}"
    return Finding("rows stand in the file before", detail, "remove" if detail else "none",
                   "remove all but the first" if detail else "", safe=True)  # fmt: skip


def near_duplicates(table: Table, look: Look) -> Finding:
    """Rows each of whose texts is nearly that of an earlier row (MinHash; Broder, 1997)."""
    near, detail = Near(look.near), {}
    for i, row in enumerate(table.rows):
        fields = [f for part in table.fields(row.raw) for f in part]
        if not any(fields):
            continue
        found = near.like(fields)
        same = [(j, s) for j, s in found if table.name_of_label(table.rows[j].raw) == table.name_of_label(row.raw)]
        if same:
            j, similarity = same[0]
            detail[i] = f"{similarity:.2f} like {table.rows[j].origin}"
        else:
            near.add(i, fields)
    return Finding("rows are nearly as an earlier one", detail, "remove" if detail else "none",
                   "remove all but the first" if detail else "")  # fmt: skip


def conflicts(table: Table, look: Look) -> Finding:
    """The same question under different labels."""
    detail: dict[int, str] = {}
    if table.format not in (*LABELLED, "kto", "choice"):
        return Finding("rows contradict another", detail)
    answer = table.label or table.columns.get("answer", "answer")
    seen: dict[bytes, dict[str, int]] = {}
    for i, row in enumerate(table.rows):
        key = table.asked(row.raw) + ("" if table.format != "kto" else "\x1f".join(table.fields(row.raw)[1]))
        labels = seen.setdefault(_digest(key), {})
        labels.setdefault(str(row.raw.get(answer)), i)
        if others := {label: j for label, j in labels.items() if label != str(row.raw.get(answer))}:
            label, j = next(iter(others.items()))
            detail[i] = f"{answer} {row.raw.get(answer)}, but {label} in {table.rows[j].origin}"
    return Finding("rows contradict an earlier one", detail, "remove" if detail else "none",
                   "remove the later ones" if detail else "")  # fmt: skip


def leakage(table: Table, look: Look) -> Finding:
    """Rows whose question stands, exactly or nearly, in the set that is held back."""
    title = "rows stand in the other set too (leakage)"
    if look.against is None:
        return Finding(title, {})
    other, near = look.against, Near(look.near)
    exact: dict[bytes, int] = {}
    for j, row in enumerate(other.rows):
        exact.setdefault(_digest(other.asked(row.raw)), j)
        near.add(j, other.fields(row.raw)[0])
    detail = {}
    for i, row in enumerate(table.rows):
        if not (asked := table.asked(row.raw)):
            continue
        if (j := exact.get(_digest(asked), -1)) >= 0:
            detail[i] = f"as {other.rows[j].origin}"
        elif found := near.like(table.fields(row.raw)[0]):
            detail[i] = f"{found[0][1]:.2f} like {other.rows[found[0][0]].origin}"
    return Finding(title, detail, "remove" if detail else "none", "remove them here" if detail else "", safe=True)


def groups(table: Table, threshold: float) -> list[int]:
    """For every row the number of the first row that must stay on its side of a split.

    Rows belong together that ask the same or nearly the same, or ask about the same context, and whatever is so linked.
    """
    parent = list(range(len(table)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def link(i: int, j: int) -> None:
        a, b = sorted((root(i), root(j)))
        parent[b] = a

    near = Near(threshold)
    first: dict[bytes, int] = {}
    context = table.columns.get("context", "context") if table.format == "qa" else None
    for i, row in enumerate(table.rows):
        asked = table.fields(row.raw)[0]
        if context is not None:
            link(i, first.setdefault(_digest("context " + normal(str(row.raw.get(context)))), i))
        if not any(asked):
            continue
        j = first.setdefault(_digest("\x1f".join(map(normal, asked))), i)
        link(i, j)
        if i != j:
            continue
        for k, _ in near.like(asked):
            link(i, k)
        near.add(i, asked)
    return [root(i) for i in range(len(table))]


class Near:
    """Texts among which nearly equal ones are found by locality-sensitive hashing, then by comparing them."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH

        self.threshold = threshold
        # Candidates are looked for somewhat below the threshold, so that hashing loses few.
        self._lsh = MinHashLSH(threshold=max(threshold - 0.15, 0.1), num_perm=_PERMUTATIONS)
        self._fields: dict[int, tuple[str, ...]] = {}

    def add(self, key: int, fields: Sequence[str]) -> None:
        """Texts of a row, column by column, under a number."""
        self._fields[key] = tuple(fields)
        self._lsh.insert(key, _sketch("\n".join(fields)))

    def like(self, fields: Sequence[str]) -> list[tuple[int, float]]:
        """Rows all of whose columns are like these, the first first, with the similarity of the column least alike."""
        found = []
        for key in sorted(self._lsh.query(_sketch("\n".join(fields)))):
            pairs = zip(fields, self._fields[key], strict=False)
            if (s := min((jaccard(a, b) for a, b in pairs), default=0.0)) >= self.threshold:
                found.append((key, s))
        return found


def jaccard(a: str, b: str) -> float:
    """Jaccard similarity of two texts' shingles of five characters; case and spaces do not count."""
    x, y = shingles(a), shingles(b)
    both = len(np.intersect1d(x, y, assume_unique=True))
    return both / (len(x) + len(y) - both)


@functools.lru_cache(maxsize=20_000)
def shingles(text: str) -> Any:
    """Hashes of a text's shingles, uint32 [n], sorted and different, at most `_MOST`."""
    plain = normal(text.casefold()).ljust(_WINDOW)
    code = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    h = (np.lib.stride_tricks.sliding_window_view(code, _WINDOW) * _FACTORS).sum(1, dtype=np.uint64)
    h = (h ^ (h >> np.uint64(29))) * _FACTORS[0]
    return np.unique((h >> np.uint64(32)).astype(np.uint32))[:_MOST]


@functools.lru_cache(maxsize=4)
def _sketch(text: str) -> Any:
    sketch = _empty().copy()  # which shares its permutations
    sketch.update_batch(shingles(text).tolist())
    return sketch


@functools.cache
def _empty() -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=_PERMUTATIONS, hashfunc=int)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
