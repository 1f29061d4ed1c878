"""Answers of a model as rows to train another one on (sequence-level distillation: Kim & Rush, 2016,
https://arxiv.org/abs/1606.07947)."""

from collections.abc import Mapping
from typing import Any

from jaxtune.data.examples import Conversation, Document, Example

_PAIRS: Mapping[str, tuple[str, str]] = {  # formats of one question and one answer, which suggest a template
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}


def row(e: Example, answer: str) -> dict[str, Any]:
    """A conversation with a model's answer in the place of its own, or a text with its continuation, in a format that
    is read without being named.

    >>> from jaxtune.data.examples import Message
    >>> row(Conversation((Message("user", "Hi"), Message("assistant", "Go")), "prompt_completion", "f:1"), "Hello")
    {'prompt': 'Hi', 'completion': 'Hello'}
    """
    if isinstance(e, Document):
        return {"text": e.text + answer}
    if not isinstance(e, Conversation):
        raise TypeError(f"{e.origin}: a {type(e).__name__} has no answer")
    asked = e.messages[:-1] if e.messages[-1].role == "assistant" else e.messages
    if e.format in _PAIRS and [m.role for m in asked] == ["user"] and not e.tools:
        return dict(zip(_PAIRS[e.format], (asked[0].content, answer), strict=True))
    tools = {"tools": list(e.tools)} if e.tools else {}
    return {"messages": [*(m.seen() for m in asked), {"role": "assistant", "content": answer}], **tools}
