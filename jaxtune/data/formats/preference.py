"""Rows to preferences: a better and a worse answer to a prompt, or an answer that was judged good or bad."""

from typing import Any

from jaxtune.data.examples import Conversation, Judged, Message, Pair
from jaxtune.data.formats import chat
from jaxtune.data.formats.values import Row, Tags, flag
from jaxtune.errors import UserError

PROMPTS = ("prompt", "conversations", "messages", "instruction")  # where a prompt can stand; the first there is holds


def pair(row: Row, origin: str, tags: Tags) -> Pair:
    """`{"prompt": "2 + 2 =", "chosen": "4", "rejected": "5"}`, all three also as messages

    The prompt may also stand in `conversations`, `messages` or Alpaca's columns; or in nothing of its own, and is then
    what both answers begin with (TRL). OpenAI's `input`, `preferred_output`, `non_preferred_output` is the same.
    """
    if "preferred_output" in row:
        return _openai(row, origin, tags)
    prompt, kind = _prompt(row, origin, tags)
    chosen, rejected = row["chosen"], row["rejected"]
    if not prompt and isinstance(chosen, str) and isinstance(rejected, str):
        n = _common(chosen, rejected)
        while n and not chosen[n - 1].isspace():  # not within a word
            n -= 1
        prompt, kind = (Message("user", chosen[:n].rstrip()),) if n else (), "prompt_completion"
        chosen, rejected = chosen[n:], rejected[n:]
    good = chat.said(chosen, "chosen", "assistant", origin, tags)
    bad = chat.said(rejected, "rejected", "assistant", origin, tags)
    if good[0].role != "assistant" and bad[0].role != "assistant":  # whole conversations
        n = _common(good, bad)
        while n and (n == len(good) or n == len(bad) or good[n].role != "assistant"):
            n -= 1
        prompt, kind = chat.with_system(row, good[:n], origin) if n else (), "messages"
        good, bad = good[n:], bad[n:]
    return _pair(prompt, good, bad, kind, origin, chat.tools(row, origin))


def kto(row: Row, origin: str, tags: Tags) -> Judged:
    """`{"prompt": "2 + 2 =", "completion": "4", "label": true}`

    `prompt` and `completion` may be messages; the conversation may also be whole, in `messages` or `conversations`, or
    stand in Alpaca's columns. LLaMA-Factory's `kto_tag` is the same as `label`.
    """
    column = "label" if row.get("label") is not None else "kto_tag"
    if row.get(column) is None:
        raise UserError(f"{origin}: no column 'label', which format 'kto' needs; map it with data.columns")
    good = flag(row[column], column, origin)
    makers = {
        "prompt": chat.prompt_completion, "conversations": chat.sharegpt, "messages": chat.messages,
        "instruction": chat.alpaca,
    }  # fmt: skip
    whole = makers[_where(row, origin)](row, origin, tags)
    if whole.messages[-1].role != "assistant":
        raise UserError(f"{origin}: the last message is not the assistant's, so there is nothing that the label judges")
    turns = (*chat.untrained(whole.messages[:-1]), whole.messages[-1])
    return Judged(Conversation(turns, whole.format, origin, whole.tools), good, origin)


def judges(label: Any) -> bool:
    """Whether a label can say that an answer is good or bad; a missing one is told of where it is read.

    >>> [judges(v) for v in (True, 0, "false", None, "joy", 3)]
    [True, True, True, True, False, False]
    """
    return label is None or str(label).strip().lower() in ("true", "false", "0", "1", "0.0", "1.0")


def _where(row: Row, origin: str) -> str:
    found = [c for c in PROMPTS if row.get(c) is not None]
    if not found:
        raise UserError(f"{origin}: has no prompt; wanted one of {', '.join(PROMPTS)}; map it with data.columns")
    return found[0]


def _prompt(row: Row, origin: str, tags: Tags) -> tuple[tuple[Message, ...], str]:
    """The turns before the answers, and the format they came in."""
    if all(row.get(c) is None for c in PROMPTS):
        return (), "messages"
    column = _where(row, origin)
    if column == "instruction":
        turns, kind = chat.alpaca_prompt(row, origin, tags), "alpaca"
    else:
        turns = chat.said(row[column], column, "user", origin, tags)
        kind = "prompt_completion" if isinstance(row[column], str) else "messages"
    return chat.with_system(row, turns, origin), kind


def _openai(row: Row, origin: str, tags: Tags) -> Pair:
    given = row.get("input")
    if not isinstance(given, dict) or "messages" not in given or row.get("non_preferred_output") is None:
        raise UserError(
            f"{origin}: 'preferred_output' wants 'non_preferred_output' and 'input' with 'messages' beside it"
        )
    asked = chat.messages(given, origin, tags)
    good, bad = (chat.said(row[c], c, "assistant", origin, tags) for c in ("preferred_output", "non_preferred_output"))
    return _pair(asked.messages, good, bad, "messages", origin, asked.tools)


def _pair(prompt: Any, good: Any, bad: Any, kind: str, origin: str, tools: Any) -> Pair:
    if not prompt:
        raise UserError(f"{origin}: has no prompt, and 'chosen' and 'rejected' do not begin alike")
    for name, turns in (("chosen", good), ("rejected", bad)):
        if not turns or turns[-1].role != "assistant":
            raise UserError(f"{origin}: {name!r} does not end with an assistant's message")
    return Pair(chat.untrained(prompt), good, bad, kind, origin, tools)


def _common(a: Any, b: Any) -> int:
    """How many items two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
