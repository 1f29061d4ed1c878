"""Train and validation: the labels' shares are kept, and rows that belong together stay on one side."""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxtune.data.pipeline import held_out


def split(
    strata: Sequence[str | None], groups: Sequence[int], validation: float, seed: int
) -> tuple[list[int], list[int]]:
    """Numbers of the rows to train on and of those held out, each in order.

    Every label gives its share of the rows held out, rounded so that the shares add up. Groups are drawn by the seed
    and held out whole where all their labels have room; where only groups are left that do not fit, fewer rows are.

    Args:
      strata: the label of every row, [n].
      groups: of every row the name of its group, [n].
      validation: a share of the rows (below 1) or a number of them.
      seed: of the draw.

    >>> split(["a", "b"] * 4, range(8), 0.25, seed=0)
    ([0, 1, 4, 5, 6, 7], [2, 3])

    Raises:
      UserError: no row would be left to train on.
    """
    n = held_out(validation, len(strata))
    room = _shares(Counter(strata), n)
    members: dict[int, list[int]] = {}
    for i, g in enumerate(groups):
        members.setdefault(g, []).append(i)
    names = list(members)
    order = np.random.default_rng(seed).permutation(len(names))
    held: list[int] = []
    for k in order:
        wanted = Counter(strata[i] for i in members[names[k]])
        if all(room[s] >= c for s, c in wanted.items()):
            room -= wanted
            held += members[names[k]]
    chosen = set(held)
    return [i for i in range(len(strata)) if i not in chosen], sorted(held)


def _shares(counts: Counter[str | None], n: int) -> Counter[str | None]:
    """How many of `n` rows each label gives, by largest remainders."""
    total = counts.total()
    exact = {s: n * c / total for s, c in counts.items()}
    shares = Counter({s: int(x) for s, x in exact.items()})
    by_remainder = sorted(exact, key=lambda s: (shares[s] - exact[s], _tie(s)))
    for s in by_remainder[: n - shares.total()]:
        shares[s] += 1
    return shares


def _tie(s: str | None) -> bytes:
    """An order of labels that does not prefer the first in the alphabet."""
    return hashlib.blake2b(str(s).encode("utf-8", "surrogatepass"), digest_size=8).digest()
