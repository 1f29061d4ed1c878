"""Exact match and F1 of answers, between 0 and 100, as the official scripts compute them.

English (and other languages with spaces): SQuAD (Rajpurkar et al., 2016; v2: Rajpurkar et al., 2018), lower case
without punctuation, articles and extra spaces, F1 over the words that are common; a question without an answer wants
the empty one. Chinese: CMRC 2018 (Cui et al., 2019), each character a word, F1 over the longest common run of them.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

from jaxtune.errors import UserError
from jaxtune.metrics.base import Scores, mean

_PUNCTUATION = set(string.punctuation)
_CHINESE_PUNCTUATION = set("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")  # what CMRC's script leaves out


def score(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], language: str = "en") -> Scores:
    """Exact match and F1, the best over a question's references, beside those with and without answers apart.

    A question that was not predicted counts 0, as in the scripts of SQuAD v1.1 and CMRC, and is counted in `details`.

    >>> score({"q": "the Eiffel Tower!"}, {"q": ["Eiffel Tower", "tower"]}).values
    {'exact_match': 100.0, 'f1': 100.0}

    Raises:
      UserError: there is nothing to score.
    """
    if not references:
        raise UserError("question answering: there are no rows to score; give data with at least one")
    exact, f1 = [], []
    for key, texts in references.items():
        # the script of v2 leaves out references that normalise to nothing
        golds = [t for t in texts if normalise(t, language)] or [""]
        missing, answer = key not in predictions, predictions.get(key, "")
        exact.append(0.0 if missing else 100.0 * max(exact_match(answer, g, language) for g in golds))
        f1.append(0.0 if missing else 100.0 * max(overlap(answer, g, language) for g in golds))
    answerable = [bool(texts) for texts in references.values()]
    values = {"exact_match": mean(exact), "f1": mean(f1)}
    if not all(answerable):
        for name, kind in (("has_answer", True), ("no_answer", False)):
            if some := [i for i, a in enumerate(answerable) if a == kind]:
                values[f"{name}_exact_match"] = mean([exact[i] for i in some])
                values[f"{name}_f1"] = mean([f1[i] for i in some])
    details = {
        "normalisation": "cmrc2018" if language == "zh" else "squad",
        "not_predicted": len(references.keys() - predictions.keys()),
        "without_answer": answerable.count(False),
    }
    return Scores(values, details, {"exact_match": exact, "f1": f1})


def normalise(text: str, language: str = "en") -> str:
    """A text as exact match compares it.

    >>> normalise("The  cat's hat."), normalise("北京，中国。", "zh")
    ('cats hat', '北京中国')
    """
    if language == "zh":
        return "".join(c for c in text.lower().strip() if c not in _CHINESE_PUNCTUATION)
    plain = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(prediction: str, reference: str, language: str = "en") -> bool:
    """Whether two texts are one when normalised."""
    return normalise(prediction, language) == normalise(reference, language)


def overlap(prediction: str, reference: str, language: str = "en") -> float:
    """F1 of one answer, between 0 and 1."""
    if language == "zh":
        ours, theirs = _segments(prediction), _segments(reference)
        common = SequenceMatcher(None, ours, theirs, autojunk=False).find_longest_match().size
    else:
        ours, theirs = normalise(prediction).split(), normalise(reference).split()
        common = sum((Counter(ours) & Counter(theirs)).values())
    if not ours or not theirs:
        return float(ours == theirs)
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def _segments(text: str) -> list[str]:
    """Chinese characters, and words of what stands between them, without punctuation."""
    from nltk.tokenize.destructive import NLTKWordTokenizer  # what nltk.word_tokenize takes, without its downloads

    kept = normalise(text, "zh")
    parts = re.findall(r"[\u4e00-\u9fa5]|[^\u4e00-\u9fa5]+", kept)
    out: list[str] = []
    for part in parts:
        out += [part] if re.match(r"[\u4e00-\u9fa5]", part) else NLTKWordTokenizer().tokenize(part)
    return out
