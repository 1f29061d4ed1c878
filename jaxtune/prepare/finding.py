"""What a check found, what it proposes, and what a check may look at beside the rows."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jaxtune.prepare.rows import Row, Table


@dataclasses.dataclass(frozen=True)
class Finding:
    """Rows that a check found something in, and a proposal for them."""

    title: str
    """What was found, in words that follow a count: "rows say the same twice"."""
    detail: Mapping[int, str]
    """Numbers of the rows, each with what is the matter with it. Holds no secret that was found."""
    action: Literal["remove", "change", "none"] = "none"
    proposal: str = ""
    """What is proposed: "remove them". Empty where there is nothing to do but to look."""
    changes: Mapping[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """The rows as they would be, where the action is "change"."""
    safe: bool = False
    """Whether the proposal is accepted without being asked for (`--yes`)."""
    remarks: tuple[str, ...] = ()
    """What holds of the file rather than of a row."""
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """A distribution over names, to draw."""
    values: Sequence[float] = ()
    """A distribution over numbers, to draw."""
    unit: str = ""

    @property
    def rows(self) -> list[int]:
        return sorted(self.detail)

    def removes(self) -> set[int]:
        """The rows that go where the proposal is accepted."""
        return set(self.detail) if self.action == "remove" else set()


@dataclasses.dataclass(frozen=True)
class Look:
    """What checks need beside the rows."""

    against: Table | None = None  # rows that none may be like: of a validation or test set
    tokens: Callable[[Table, Row], int] | None = None  # how many tokens a row has
    max_length: int = 1024
    near: float = 0.8  # Jaccard similarity of near duplicates
    words: Sequence[str] = ()  # offensive terms
    seed: int = 0


Check = Callable[[Table, Look], Finding]


def apply(table: Table, finding: Finding) -> Table:
    """The table with the proposal of a finding accepted."""
    gone = finding.removes()
    rows = [
        r if i not in finding.changes else Row(r.origin, finding.changes[i])
        for i, r in enumerate(table.rows)
        if i not in gone
    ]
    return dataclasses.replace(table, rows=tuple(rows))
