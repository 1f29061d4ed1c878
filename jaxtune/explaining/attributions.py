"""Which tokens an answer comes from: integrated gradients, gradient × input, occlusion.

Dimensions: T tokens that are read, P tokens of the text, D embed, N points on a path.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxtune.errors import UserError
from jaxtune.explaining.questions import Question
from jaxtune.explaining.reader import Reader

METHODS = ("integrated_gradients", "gradient_x_input", "occlusion")
BASELINES = ("pad", "zero")
TOLERANCE = 0.01  # of the difference that integrated gradients have to add up to
_FEW, _MANY = 32, 1024  # points on a path at first, and at most
_SMALL = 0.01  # where the difference is below this, the tolerance is of this
Slope = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Integral(NamedTuple):
    """Integrated gradients, and how far they are from adding up to the difference."""

    score_T: np.ndarray
    steps: int
    error: float  # |sum − difference| / |difference|

    @property
    def complete(self) -> bool:
        return self.error <= TOLERANCE


class Attributions(NamedTuple):
    """What each token of a text adds to the value of an answer."""

    value: float  # of the text
    baseline_value: float  # where its embeddings are the baseline's
    score_P: Mapping[str, np.ndarray]  # by method
    steps: int
    error: float
    complete: bool

    def told(self) -> dict[str, Any]:
        """As explain.json holds it, without the scores."""
        return {
            "value": self.value, "baseline_value": self.baseline_value, "steps": self.steps,
            "completeness_error": self.error, "complete": self.complete,
        }  # fmt: skip


def points(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss and Legendre's places between baseline (0) and text (1) where slopes are taken, and their weights.

    >>> at, weight = points(4)
    >>> round(float((weight * at**7).sum()), 9)
    0.125
    """
    x, w = np.polynomial.legendre.leggauss(n)
    return (x + 1) / 2, w / 2


def integrate(slope: Slope, difference: float, few: int = _FEW, many: int = _MANY) -> Integral:
    """Integrated gradients (Sundararajan et al., 2017, https://arxiv.org/abs/1703.01365).

    By their axiom of completeness they add up to the difference between the values of text and baseline. The number of
    points is doubled until they do within `TOLERANCE`, or there are `many`.

    Args:
      slope: of places on the path and their weights, the weighted sum of (x − baseline) · gradient, `[T]`.
      difference: of the values.
      few: points at first.
      many: points at most.
    """
    n = few
    while True:
        score_T = slope(*points(n))
        error = abs(float(score_T.sum()) - difference) / max(abs(difference), _SMALL)
        if error <= TOLERANCE or n * 2 > many:
            return Integral(score_T, n, error)
        n *= 2


def attribute(reader: Reader, q: Question, baseline: str = "pad") -> Attributions:
    """What each token of a question's text adds to the value of its answer, by all `METHODS`.

    The baseline stands in the place of the text's embeddings. Special tokens, virtual ones and the answer's own stay as
    they are, and add nothing. The gradient is multiplied by (input − baseline); occlusion is the value that is lost
    when one token alone is replaced.

    Of zero embeddings a norm makes what it will: the value falls and rises on a path that ends there, down to the
    smallest numbers, and no number of points may suffice.

    Args:
      reader: the model.
      q: the question.
      baseline: "pad", the embedding of that token (see `pad_token`), or "zero".
    """
    a = reader.asked(q)
    x_TD = reader.embedded(a.ids_T)
    special = {*reader.tuned.tokenizer.all_special_ids}
    places = [i for i in range(q.prompt.start, q.prompt.stop) if q.ids[i] not in special]
    base_TD = x_TD.copy()
    base_TD[places] = _baseline(reader, baseline)

    def without(i: int) -> np.ndarray:
        out_TD = x_TD.copy()
        out_TD[i] = base_TD[i]
        return out_TD

    asked = (x for made in ([x_TD, base_TD], map(without, places)) for x in made)
    value_N = reader.values(a, asked, 2 + len(places))
    value, nothing = value_N[:2].tolist()
    found = integrate(lambda alpha_N, w_N: reader.slopes(a, x_TD, base_TD, alpha_N, w_N), value - nothing)
    lost_T = np.zeros(len(x_TD))
    lost_T[places] = value - value_N[2:]
    by_method = {
        "integrated_gradients": found.score_T,
        "gradient_x_input": reader.slopes(a, x_TD, base_TD, np.ones(1), np.ones(1)),
        "occlusion": lost_T,
    }
    scores = {name: score_T[q.prompt] for name, score_T in by_method.items()}
    return Attributions(value, nothing, scores, found.steps, found.error, found.complete)


def pad_token(tokenizer: Any) -> int:
    """The token that stands for nothing: pad, else unknown, else the end, else the beginning.

    Raises:
      UserError: the tokenizer has none of them.
    """
    ids = (getattr(tokenizer, f"{name}_token_id") for name in ("pad", "unk", "eos", "bos"))
    if (found := next((i for i in ids if i is not None), None)) is None:
        raise UserError("--baseline pad: the tokenizer has no pad token and none for its place; take --baseline zero")
    return found


def _baseline(reader: Reader, kind: str) -> Any:
    if kind == "zero":
        return 0.0
    return reader.embedded(np.array([pad_token(reader.tuned.tokenizer)], np.int32))[0]
