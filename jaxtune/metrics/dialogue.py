"""How varied answers are: distinct n-grams (Li et al., 2016). Perplexity comes from the loss."""

from collections.abc import Sequence

from jaxtune.errors import UserError
from jaxtune.metrics.base import Scores, mean
from jaxtune.metrics.language import words


def score(predictions: Sequence[str]) -> Scores:
    """The share of different n-grams among all n-grams of all answers, and the mean length of an answer in words.

    >>> score(["a b a", "b a"]).values
    {'distinct1': 0.4, 'distinct2': 0.6666666666666666, 'mean_length': 2.5}

    Raises:
      UserError: there is nothing to score.
    """
    if not predictions:
        raise UserError("dialogue: there are no answers to score; give data with at least one")
    texts = [words(p) for p in predictions]
    values = {}
    for n in (1, 2):
        grams = [tuple(t[i : i + n]) for t in texts for i in range(len(t) - n + 1)]
        values[f"distinct{n}"] = len(set(grams)) / max(1, len(grams))
    lengths = [float(len(t)) for t in texts]
    details = {"empty": lengths.count(0.0)}
    return Scores({**values, "mean_length": mean(lengths)}, details, {"mean_length": lengths})
