"""Accuracy of multiple choice from the log-likelihood of each choice."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtune.errors import UserError
from jaxtune.metrics.base import Scores, mean


class Choice(NamedTuple):
    """What a model makes of one choice."""

    text: str
    logprob: float  # nats, of all its tokens
    tokens: int


def score(predictions: Sequence[Sequence[Choice]], references: Sequence[int]) -> Scores:
    """The share of rows whose right choice is the likeliest: in all (`acc`), per character of the choice (`acc_norm`)
    and per token (`acc_token`). The first two are lm_eval's of the same names.

    Raises:
      UserError: there is nothing to score.
    """
    if not references:
        raise UserError("choice: there are no rows to score; give data with at least one")
    rows: dict[str, list[float]] = {"acc": [], "acc_norm": [], "acc_token": []}
    for choices, right in zip(predictions, references, strict=True):
        picks = best(choices), best(choices, "characters"), best(choices, "tokens")
        for name, pick in zip(rows, picks, strict=True):
            rows[name].append(float(pick == right))
    return Scores({k: mean(v) for k, v in rows.items()}, {}, rows)


def best(choices: Sequence[Choice], per: str = "") -> int:
    """The number of the likeliest choice; per one of its "characters" or "tokens" where asked for.

    >>> best([Choice("no", -2.0, 1), Choice("yes, certainly", -3.0, 4)], "characters")
    1
    """

    def likely(c: Choice) -> float:
        return c.logprob / max(1, len(c.text) if per == "characters" else c.tokens if per == "tokens" else 1)

    return max(range(len(choices)), key=lambda i: likely(choices[i]))
