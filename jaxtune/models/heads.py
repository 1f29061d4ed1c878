"""Heads in the place of the language model's, named and shaped as transformers has them.

| kind | transformers' class | weights | what it gives |
|---|---|---|---|
| classification | …ForSequenceClassification | score.weight | a logit a label, at the last token |
| regression | the same, problem_type regression | score.weight | a number, at the last token |
| token_classification | …ForTokenClassification | score.weight, score.bias | a logit a label, at each token |
| span_qa | …ForQuestionAnswering | qa_outputs.weight, .bias | logits of start and end, at each token |
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

CLASSES: Mapping[str, str] = {
    "classification": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "span_qa": "ForQuestionAnswering",
}
_SINGLE, _MULTI, _NUMBER = "single_label_classification", "multi_label_classification", "regression"
# what transformers 5 lacks: the export then opens in jaxtune alone
_LACKING: Mapping[str, tuple[str, ...]] = {
    "granite": ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"),
    "gemma": ("ForQuestionAnswering",),
    "gemma2": ("ForQuestionAnswering",),
    "gemma3_text": ("ForTokenClassification", "ForQuestionAnswering"),
    "phi3": ("ForQuestionAnswering",),
    "olmo2": ("ForTokenClassification", "ForQuestionAnswering"),
    "olmo3": ("ForTokenClassification", "ForQuestionAnswering"),
}


@dataclasses.dataclass(frozen=True)
class TaskHead:
    """What a model gives instead of the next token."""

    kind: str  # a key of `CLASSES`, which are names of objectives too
    labels: tuple[str, ...]  # of span_qa: "answer", and "none" where a question may have no answer
    multi: bool = False  # several labels at once

    @property
    def size(self) -> int:
        """C, the outputs."""
        return {"regression": 1, "span_qa": 2}.get(self.kind, len(self.labels))

    @property
    def module(self) -> str:
        return "qa_outputs" if self.kind == "span_qa" else "score"

    @property
    def bias(self) -> bool:
        return CLASSES[self.kind] != "ForSequenceClassification"

    def opens_in_transformers(self, family: str) -> bool:
        """Whether transformers has a class for it."""
        return CLASSES[self.kind] not in _LACKING.get(family, ())


def from_hf(config: Mapping[str, Any]) -> TaskHead | None:
    """The head that a config.json names, None where it is a language model's.

    >>> from_hf({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "ham", "1": "spam"}})
    TaskHead(kind='classification', labels=('ham', 'spam'), multi=False)
    """
    architecture = next(iter(config.get("architectures") or ()), "")
    kind = next((k for k, c in CLASSES.items() if architecture.endswith(c)), None)
    if kind is None:
        return None
    names = {int(i): str(n) for i, n in (config.get("id2label") or {}).items()}
    labels = tuple(n for _, n in sorted(names.items()))
    if kind == "span_qa":
        return TaskHead(kind, labels or ("answer",))
    labels = labels or tuple(f"LABEL_{i}" for i in range(config.get("num_labels") or 2))
    problem = config.get("problem_type")
    if kind == "classification" and (problem == _NUMBER or (problem is None and len(labels) == 1)):
        return TaskHead("regression", labels)
    return TaskHead(kind, labels, problem == _MULTI)


def to_hf(head: TaskHead | None, config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """What a config.json says of a head: `architectures`, the labels, the kind of problem. Nothing of a language
    model's, where the config is of one already."""
    stem = next(iter(config.get("architectures") or ("",))).partition("For")[0]
    if head is None:
        mine = stem.removesuffix("Text") if family == "gemma3_text" else stem
        return {"architectures": [f"{mine}ForCausalLM"]} if from_hf(config) is not None else {}
    out: dict[str, Any] = {
        "architectures": [("Gemma3Text" if family == "gemma3_text" else stem) + CLASSES[head.kind]],
        "id2label": {str(i): n for i, n in enumerate(head.labels)},
        "label2id": {n: i for i, n in enumerate(head.labels)},
    }
    if CLASSES[head.kind] == "ForSequenceClassification":
        out["problem_type"] = _NUMBER if head.kind == "regression" else _MULTI if head.multi else _SINGLE
    if head.kind == "token_classification":
        out["classifier_dropout"] = 0.0  # there is none here, and transformers would apply its own when it trains
    return out


def renamed(tensors: Mapping[str, Any], head: TaskHead | None, family: str, back: bool = False) -> dict[str, Any]:
    """Tensors by name as transformers has them under a head: LLaMA's is the one class with another name for its body.

    `back` is from transformers' names to the usual ones.
    """
    old, new = ("transformer.", "model.") if back else ("model.", "transformer.")
    if head is None or head.kind != "span_qa" or family != "llama":
        return dict(tensors)
    return {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in tensors.items()}
