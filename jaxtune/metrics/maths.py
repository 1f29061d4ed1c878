"""Exact answers of GSM8K (Cobbe et al., 2021): the number after `####`."""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from jaxtune.errors import UserError
from jaxtune.metrics.base import Scores, mean

_NUMBER = r"-?[$€£]?\d[\d,]*(?:\.\d+)?|-?[$€£]?\.\d+"
_MARKED = re.compile(rf"####\s*({_NUMBER})")


def score(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """The share of rows whose number after `####` is the reference's, and of those whose last number is (flexible).

    Numbers are compared as numbers: 1,200 is 1200.00. A reference without `####` counts with its last number.

    Raises:
      UserError: there is nothing to score, or a reference has no number.
    """
    if not references:
        raise UserError("maths: there are no rows to score; give data with at least one")
    wanted = []
    for r in references:
        if (number := answer(r, flexible=True)) is None:
            raise UserError(f"maths: the reference {r[:60]!r} has no number; its last line should be like '#### 42'")
        wanted.append(number)
    pairs = list(zip(predictions, wanted, strict=True))
    strict = [float(answer(p) == w) for p, w in pairs]
    loose = [float(answer(p, flexible=True) == w) for p, w in pairs]
    values = {"exact_match": mean(strict), "exact_match_flexible": mean(loose)}
    without = sum(answer(p, flexible=True) is None for p in predictions)
    return Scores(values, {"without_number": without}, {"exact_match": strict, "exact_match_flexible": loose})


def answer(text: str, flexible: bool = False) -> Decimal | None:
    """The number after the first `####`; where there is none and `flexible`, the last number of the text.

    >>> answer("so 3 * 4 = 12\\n#### 1,012"), answer("It is $7.50.", flexible=True), answer("It is 7")
    (Decimal('1012'), Decimal('7.50'), None)
    """
    found = _MARKED.search(text)
    numbers = [found[1]] if found else re.findall(_NUMBER, text) if flexible else []
    if not numbers:
        return None
    try:
        return Decimal(re.sub("[,$€£]", "", numbers[-1]))
    except InvalidOperation:  # digits of other scripts that are no decimals
        return None
