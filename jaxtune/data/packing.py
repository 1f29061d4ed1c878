"""Several examples in a row, each its own segment with positions of its own.

Dimensions: B batch, T time.
"""

import bisect
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


def lay_out(examples: Sequence[Encoded], length: int) -> dict[str, np.ndarray]:
    """One row of the batch: int32 columns of `length`; segments from 1, 0 is padding.

    >>> e = Encoded(np.array([7, 8]), np.array([False, True]))
    >>> lay_out([e, e], 5)["segment_BT"], lay_out([e, e], 5)["position_BT"]
    (array([1, 1, 2, 2, 0], dtype=int32), array([0, 1, 0, 1, 0], dtype=int32))
    """
    row = {name: np.zeros(length, np.int32) for name in COLUMNS}
    at = 0
    for k, e in enumerate(examples, 1):
        here = slice(at, at + len(e.ids))
        row["ids_BT"][here] = e.ids
        row["loss_mask_BT"][here] = e.mask
        row["segment_BT"][here] = k
        row["position_BT"][here] = np.arange(len(e.ids))
        at += len(e.ids)
    return row
