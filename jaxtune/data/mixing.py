"""Several sets of data as one: one after the other by weight, or drawn from in turn.

Interleaving means what `datasets.interleave_datasets` means by it: the next row is that of a set drawn with its weight
as the odds, until the first set is used up ("under"), or until all are, those that were begin again ("over").
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np


def mixed(lengths: Sequence[int], weights: Sequence[float], how: str, seed: int) -> list[tuple[int, int]]:
    """Set and row of everything to train on; a function of the seed.

    >>> mixed([2, 4], [2, 0.5], "concat", seed=0)
    [(0, 0), (0, 1), (0, 0), (0, 1), (1, 0), (1, 3)]
    >>> mixed([2, 4], [1, 1], "interleave_under", seed=0)
    [(1, 0), (0, 0), (0, 1)]
    """
    if how == "concat":
        return [(k, i) for k, (n, w) in enumerate(zip(lengths, weights, strict=True)) for i in _weighed(n, w, seed, k)]
    if not all(lengths):
        raise ValueError("a set to interleave has no rows")
    return list(_interleaved(lengths, weights, how == "interleave_over", seed))


def _weighed(n: int, weight: float, seed: int, k: int) -> Iterator[int]:
    """The whole set as often as the weight says, then a part of it, drawn."""
    for _ in range(math.floor(weight)):
        yield from range(n)
    part = round((weight % 1) * n)
    yield from sorted(np.random.default_rng([seed, k]).permutation(n)[:part].tolist())


def _interleaved(lengths: Sequence[int], weights: Sequence[float], over: bool, seed: int) -> Iterator[tuple[int, int]]:
    rng, odds = np.random.default_rng(seed), np.array(weights) / sum(weights)
    at, used_up = [0] * len(lengths), [False] * len(lengths)
    while True:
        for k in rng.choice(len(lengths), size=1000, p=odds).tolist():
            yield k, at[k]
            at[k] += 1
            if at[k] == lengths[k]:
                at[k], used_up[k] = 0, True
                if all(used_up) if over else any(used_up):
                    return
