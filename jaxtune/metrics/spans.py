"""Precision, recall and F1 of entities, from tags such as B-city I-city O; between 0 and 1.

An entity counts where its type, its first and its last word are right (CoNLL-2000; Tjong Kim Sang and Buchholz, 2000).
As in conlleval and in seqeval's default mode, an I- that follows no tag of its type begins an entity.
"""

from collections import Counter
from collections.abc import Sequence

from jaxtune.errors import UserError
from jaxtune.metrics.base import Scores, mean

Span = tuple[str, int, int]  # type, first word, last word


def score(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> Scores:
    """Scores over all entities, their macro mean over the types, and accuracy over all tags.

    >>> score([["B-a", "O", "B-b"]], [["B-a", "O", "O"]]).values["precision"]
    0.5

    Raises:
      UserError: there is nothing to score, or a row's tags differ in number.
    """
    if not references:
        raise UserError("token classification: there are no rows to score; give data with at least one")
    right, ours, theirs = Counter[str](), Counter[str](), Counter[str]()
    hits, total, rows = 0, 0, []
    for i, (p, r) in enumerate(zip(predictions, references, strict=True)):
        if len(p) != len(r):
            raise UserError(f"token classification: row {i + 1} has {len(p)} predicted tags for {len(r)} words")
        found, wanted = set(entities(p)), set(entities(r))
        right.update(kind for kind, *_ in found & wanted)
        ours.update(kind for kind, *_ in found)
        theirs.update(kind for kind, *_ in wanted)
        hits, total = hits + sum(a == b for a, b in zip(p, r, strict=True)), total + len(r)
        rows.append(_prf(len(found & wanted), len(found), len(wanted))["f1"] if found or wanted else 1.0)
    types = sorted(ours | theirs)
    of_type = {k: {**_prf(right[k], ours[k], theirs[k]), "entities": theirs[k]} for k in types}
    values = _prf(right.total(), ours.total(), theirs.total())
    values |= {"f1_macro": mean([x["f1"] for x in of_type.values()]), "accuracy": hits / max(1, total)}
    return Scores(values, {"types": of_type}, {"f1": rows})


def entities(tags: Sequence[str]) -> list[Span]:
    """The entities of one row.

    >>> entities(["B-city", "I-city", "O", "I-day", "B-day"])
    [('city', 0, 1), ('day', 3, 3), ('day', 4, 4)]
    """
    spans: list[Span] = []
    before, kind, first = "O", "", 0
    for i, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        goes_on = mark == "I" and before != "O" and name == kind
        if before != "O" and not goes_on:
            spans.append((kind, first, i - 1))
        if mark != "O" and not goes_on:
            first = i
        before, kind = mark, name
    return spans


def _prf(right: int, ours: int, theirs: int) -> dict[str, float]:
    precision, recall = right / max(1, ours), right / max(1, theirs)
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}
