"""Several examples in a row, each its own segment with positions of its own.

Dimensions: B batch, T time.
"""

import bisect
import math
from collections.abc import Sequence

import numpy as np

from jaxtune.data.encode import Encoded

COLUMNS = ("ids_BT", "loss_mask_BT", "segment_BT", "position_BT")


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of example numbers, by best fit in decreasing length: each example goes where the least room is left.

    >>> pack([5, 3, 2, 6], 8)
    [[3, 2], [0, 1]]
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> rows
    rooms: list[int] = []  # the keys of by_room, sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        n = lengths[i]
        if n > capacity:
            raise ValueError(f"example {i} has {n} tokens, a row holds {capacity}")
        at = bisect.bisect_left(rooms, n)
        if at == len(rooms):
            rows.append([i])
            row, room = len(rows) - 1, capacity
        else:
            room = rooms[at]
            row = by_room[room].pop()
            rows[row].append(i)
            if not by_room[room]:
                del by_room[room]
                rooms.pop(at)
        left = room - n
        if left not in by_room:
            by_room[left] = []
            bisect.insort(rooms, left)
        by_room[left].append(row)
    return rows


def buckets(lengths: Sequence[int], capacity: int) -> tuple[int, ...]:
    """Lengths for rows of one example each: 64, 128, 256 …, and the longest's (in steps of 32), rising.

    Each is a program to compile, so a length that fewer than one example in twenty would take is left out.

    >>> buckets([40] * 30 + [90] * 30 + [200] + [1000] * 5, 1024)
    (64, 128, 1024)
    """
    top = min(capacity, math.ceil(max(lengths) / 32) * 32)
    found: list[int] = []
    below = 0
    for T in (64 << k for k in range(32)):
        if top <= T:
            return (*found, top)
        upto = sum(n <= T for n in lengths)
        if (upto - below) * 20 >= len(lengths):
            found.append(T)
            below = upto
    raise ValueError(f"{top} tokens are more than a row can have")


def lay_out(
    examples: Sequence[Encoded], length: int, like: Encoded | None = None, segments: int = 0
) -> dict[str, np.ndarray]:
    """One row of the batch: int32 columns of `length`; segments from 1, 0 is padding.

    The examples' own columns come along: `name_T` as `name_BT`; `name_S` as `name_BS` with room for so many `segments`,
    and `last_BS` says where each segment ends, -1 where there is none. `like` has these columns where a row is empty.

    >>> e = Encoded(np.array([7, 8]), np.array([False, True]))
    >>> lay_out([e, e], 5)["segment_BT"], lay_out([e, e], 5)["position_BT"]
    (array([1, 1, 2, 2, 0], dtype=int32), array([0, 1, 0, 1, 0], dtype=int32))
    >>> labelled = e._replace(columns={"label_S": np.int32(3)})
    >>> row = lay_out([labelled], 5, labelled, segments=2)
    >>> row["label_BS"], row["last_BS"]
    (array([3, 0], dtype=int32), array([ 1, -1], dtype=int32))
    """
    row = {name: np.zeros(length, np.int32) for name in COLUMNS}
    own = {name: np.asarray(x) for name, x in (like or examples[0]).columns.items()} if like or examples else {}
    for name, x in own.items():
        shape = (segments, *x.shape) if name.endswith("_S") else (length, *x.shape[1:])
        row[_batched(name)] = np.zeros(shape, x.dtype)
    if any(name.endswith("_S") for name in own):
        row["last_BS"] = np.full(segments, -1, np.int32)
    at = 0
    for k, e in enumerate(examples, 1):
        here = slice(at, at + len(e.ids))
        row["ids_BT"][here] = e.ids
        row["loss_mask_BT"][here] = e.mask
        row["segment_BT"][here] = k
        row["position_BT"][here] = np.arange(len(e.ids))
        at += len(e.ids)
        for name, x in e.columns.items():
            row[_batched(name)][k - 1 if name.endswith("_S") else here] = x
        if "last_BS" in row:
            row["last_BS"][k - 1] = at - 1
    return row


def _batched(name: str) -> str:
    stem, _, axes = name.rpartition("_")
    return f"{stem}_B{axes}"
