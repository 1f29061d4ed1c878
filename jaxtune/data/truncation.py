"""What of an example goes when it is longer than a row.

A conversation is cut so that a question, the assistant's header and a part of its answer stay, and so that the
template's own tokens are whole: turns are dropped, or the text of messages is shortened and rendered again. Then:

  right   the end goes: all after the answer that is cut. Where not even the first answer has room, the longest messages
          before it lose their middle, so that a quarter of the room, or all it needs, is the answer's.
  left    the oldest questions with their answers go, the system message stays. Where the last alone is too long, the
          longest messages before its answer lose their beginning, so that half of the room, or all it needs, is the
          answer's.
  middle  no turn goes; the longest messages before the last answer lose their middle, with half for it as above.

Where they cannot be cut that far, the answer has what is left. It is only ever cut at its end, and then it does not
end: the token that would is gone. An earlier answer that had to be shortened is not trained on. The system message is
the last to be shortened.
"""

import bisect
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data.examples import Conversation, Message

KEPT = 8  # tokens of a message that are never cut


class Laid(NamedTuple):
    """A conversation as tokens, which of them are trained on, and where its last answer begins."""

    ids: np.ndarray  # int32 [n]
    mask: np.ndarray  # bool [n]
    start: int

    @property
    def answer(self) -> int:
        """Tokens of the last answer."""
        return int(np.flatnonzero(self.mask)[-1]) + 1 - self.start


def cut(
    c: Conversation,
    answers: Sequence[int],
    room: int,
    where: str,
    lay: Callable[[Conversation], Laid],
    tokenizer: Any,
) -> tuple[np.ndarray, np.ndarray] | None:
    """The ids and mask of what stays of a conversation; None where it cannot be cut to fit.

    Args:
      c: the conversation.
      answers: numbers of the messages that are trained on, at least one.
      room: tokens that there are.
      where: "right", "left" or "middle".
      lay: a conversation that ends with an answer, as tokens.
      tokenizer: the model's.
    """

    def until(i: int) -> Conversation:
        return c._replace(messages=c.messages[: i + 1])

    if where == "right":
        # The last answer that begins within the room: bisection, as each try renders and tokenises all before it.
        n = bisect.bisect_left(answers, True, lo=1, key=lambda i: lay(until(i)).start >= room)
        if n > 1:
            return _within(lay(until(answers[n - 1])), room)
        c = until(answers[0])
    elif where == "left":
        c = until(answers[-1])
        head = int(c.messages[0].role == "system")
        later = [i for i, m in enumerate(c.messages) if m.role == "user" and i > head]
        shorter = [c, *(c._replace(messages=(*c.messages[:head], *c.messages[i:])) for i in later)]
        n = bisect.bisect_left(shorter, True, hi=len(shorter) - 1, key=lambda s: len(lay(s).ids) <= room)
        c = shorter[n]
    else:
        c = until(answers[-1])
    laid = lay(c)
    share = min(laid.answer, room // (4 if where == "right" else 2))
    while laid.start > room - share:
        shortened = _shorten(c.messages[:-1], laid.start - room + share, where == "left", tokenizer)
        if shortened is None:
            break
        c = c._replace(messages=(*shortened, c.messages[-1]))
        laid = lay(c)
    return _within(laid, room) if laid.start < room else None


def cut_plain(ids: np.ndarray, mask: np.ndarray, room: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """The same for text without turns: the first or the last `room` tokens, or both ends.

    What is not trained on makes room for a quarter of what is.

    >>> cut_plain(np.arange(6), np.arange(6) > 3, 4, "right")[0]
    array([0, 1, 3, 4])
    """
    trained = np.flatnonzero(mask)
    if where == "left" or not len(trained):
        stop = int(trained[-1]) + 1 if len(trained) else len(ids)
        keep = np.arange(max(0, stop - room), stop)
    elif where == "middle":
        keep = np.r_[: (room + 1) // 2, len(ids) - room // 2 : len(ids)]
    else:
        start = int(trained[0])
        before = min(start, room - min(len(trained), max(1, room // 4)))
        keep = np.r_[: (before + 1) // 2, start - before // 2 : len(ids)][:room]
    return ids[keep], mask[keep]


def _within(laid: Laid, room: int) -> tuple[np.ndarray, np.ndarray]:
    mask = laid.mask[:room]
    n = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0  # what follows the answer is of no use
    return laid.ids[:n], mask[:n]


def _beyond(n: int, lengths: Collection[int]) -> int:
    """What lengths have beyond `n`, together."""
    return sum(max(0, x - n) for x in lengths)


def _shorten(messages: Sequence[Message], over: int, left: bool, tokenizer: Any) -> list[Message] | None:
    """Messages with about `over` tokens less: the longest are cut to one length, the system's last. None: they cannot.

    With `left` their beginning is cut, else, and of the system message, their middle.
    """
    out = list(messages)
    offsets = [
        tokenizer(m.content, add_special_tokens=False, return_offsets_mapping=True).offset_mapping for m in messages
    ]
    for system in (False, True):
        among = {i: len(offsets[i]) for i, m in enumerate(messages) if (m.role == "system") == system}
        lengths = range(KEPT, max([KEPT, *among.values()]) + 1)
        # The greatest length that is short enough for all of them.
        n = lengths[max(0, bisect.bisect_left(lengths, True, key=lambda n: _beyond(n, among.values()) < over) - 1)]
        for i, tokens in among.items():
            if tokens > n:
                content, head = out[i].content, 0 if left and not system else (n + 1) // 2
                start, stop = offsets[i][head - 1][1] if head else 0, offsets[i][tokens - n + head - 1][1]
                out[i] = out[i]._replace(content=content[:start] + content[stop:], trained=False)
        over -= _beyond(n, among.values())
        if over <= 0:
            break
    return out if [m.content for m in out] != [m.content for m in messages] else None
