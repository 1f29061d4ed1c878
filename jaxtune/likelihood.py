"""How likely given texts are after a prompt: to choose among answers. (Single completions: `Generator.judge`.)

Dimensions: R rows (answers of each prompt, prompt by prompt), C answer length.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxtune import decoding
from jaxtune.errors import UserError
from jaxtune.generate import Generator, bucket, row_bucket
from jaxtune.metrics.choice import Choice

_TOGETHER = 8  # answers of a prompt that are read at once; the cache is copied for each
_STEP = 8  # answer lengths are rounded up to this


class _Asked(NamedTuple):
    """A prompt and its answers as tokens, after what all of them share."""

    prompt: list[int]
    answers: list[list[int]]


def fitted(ids: Sequence[int], room: int) -> list[int]:
    """Tokens of a prompt within so much room: what is too many goes out of the middle.

    The beginning holds a template's first tokens and the instruction, the end the question and the answer's header.

    >>> fitted(range(10), 5)
    [0, 1, 2, 8, 9]
    """
    n, kept = len(ids), list(ids)
    return kept if n <= room else kept[: room - room // 2] + kept[n - room // 2 :]


def choose(
    g: Generator,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    closed: bool,
    batch_size: int = 8,
    said: Callable[[int], None] = lambda n: None,
) -> tuple[list[list[Choice]], int]:
    """The log-probability of each answer to each prompt, and how many prompts were too long and lost their middle.

    A prompt is read once for all of its answers. Prompt and answer are encoded as one, as they are in training; what
    counts begins at the first token in which any answer's encoding differs from the prompt's own.

    Args:
      g: the model.
      prompts: texts as the model sees them.
      answers: of each prompt, in any number.
      closed: count the end of the answer too, so that "good" and "good enough" can be told apart: the answer with the
        highest value is then the one that decoding among them alone would find likeliest.
      batch_size: prompts at a time.
      said: is told how many prompts are done.

    Raises:
      UserError: an answer is empty or does not fit into the model's context.
    """
    room = min(g.context, g.switch)
    asked, cut = [], 0
    for i, (prompt, texts) in enumerate(zip(prompts, answers, strict=True)):
        if empty := [a for a in texts if not a]:
            raise UserError(f"prompt {i + 1}: has an empty answer among {len(texts)}, {empty}; leave it out")
        one = _asked(g, prompt, texts)
        left = room - max(map(len, one.answers))
        if not one.prompt or left < 1:
            raise UserError(
                f"prompt {i + 1}: no room for its answers in the model's context of {room} tokens"
                if left < 1
                else f"prompt {i + 1} is empty; give at least the token that texts begin with"
            )
        cut += len(one.prompt) > left
        asked.append(one._replace(prompt=fitted(one.prompt, left)))
    found: dict[int, list[float]] = {}
    order = sorted(range(len(asked)), key=lambda i: -len(asked[i].prompt))
    for first in range(0, len(order), batch_size):
        part = order[first : first + batch_size]
        found |= zip(part, _values(g, [asked[i] for i in part], g.eos if closed else ()), strict=True)
        said(len(found))
    return [
        [Choice(a, v, len(ids)) for a, v, ids in zip(answers[i], found[i], x.answers, strict=True)]
        for i, x in enumerate(asked)
    ], cut


def _asked(g: Generator, prompt: str, texts: Sequence[str]) -> _Asked:
    before = g.encode(prompt)
    wholes = [g.encode(prompt + a) for a in texts]
    start = min(_common(before, w) for w in wholes)
    return _Asked(before[:start], [w[start:] for w in wholes])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with together; one of the second is left over."""
    n = min(len(a), len(b) - 1)
    return next((i for i in range(n) if a[i] != b[i]), n)


def _values(g: Generator, part: Sequence[_Asked], ends: Sequence[int]) -> list[list[float]]:
    """The log-probabilities of all answers of some prompts."""
    B, most = row_bucket(len(part)), max(len(x.answers) for x in part)
    C = -(-max(len(a) for x in part for a in x.answers) // _STEP) * _STEP
    ids_BT, segment_BT = g.left_padded([x.prompt for x in part], B)
    read = decoding.prefill(
        g.model, g.weights, ids_BT, segment_BT, None, bucket(ids_BT.shape[1] + C), copies=1, seen=False
    )
    copies = min(_TOGETHER, row_bucket(most))
    out: list[list[float]] = [[] for _ in part]
    for first in range(0, most, copies):
        ids_BkC, length_Bk = np.zeros((B, copies, C), np.int32), np.ones((B, copies), np.int32)
        for row, x in enumerate(part):
            for k, answer in enumerate(x.answers[first : first + copies]):
                ids_BkC[row, k, : len(answer)], length_Bk[row, k] = answer, len(answer)
        value_R = decoding.follow(
            g.model, g.weights, read, jnp.asarray(ids_BkC.reshape(-1, C)), jnp.asarray(length_Bk.reshape(-1)),
            tuple(ends),
        )  # fmt: skip
        for row, values in enumerate(np.asarray(value_R).reshape(B, copies).tolist()):
            if row < len(part):
                out[row] += values[: max(0, len(part[row].answers) - first)]
    return out
