"""What a row of a training file has to be: the checks of OpenAI's cookbook by their names, with the place in the JSON.

| format | a line |
|-|-|
| chat | `{"messages": [{"role", "content", …}, …], "tools"?, "parallel_tool_calls"?, "functions"?}` |
| completion | `{"prompt": text, "completion": text}` |
| preference | `{"input": {"messages": […]}, "preferred_output": [message], "non_preferred_output": [message]}` |
"""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxtune.errors import nearest
from jaxtune.serve.checks.lines import Finding, kind

CHAT, COMPLETION, PREFERENCE = "chat", "completion", "preference"
METHODS = {CHAT: "supervised", COMPLETION: "supervised", PREFERENCE: "dpo"}  # which method takes which format
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_KEYS = (
    "role", "content", "name", "function_call", "weight", "tool_calls", "tool_call_id", "refusal", "reasoning_content",
)  # fmt: skip
_BESIDE = ("messages", "tools", "parallel_tool_calls", "functions")
_ANSWERS = (
    ("preferred_output", "non_preferred_output"), ("preferred_completion", "non_preferred_completion"),
)  # fmt: skip
UNKNOWN = "Unexpected file format, expected either prompt/completion pairs or chat messages."


def format_of(row: Mapping[str, Any]) -> str | None:
    """The format that a row's keys are of.

    >>> format_of({"prompt": "1 + 1 =", "completion": " 2"})
    'completion'
    """
    if any(name in row for pair in _ANSWERS for name in pair):
        return PREFERENCE
    if "messages" in row:
        return CHAT
    return COMPLETION if "prompt" in row or "completion" in row else None


def findings(row: Mapping[str, Any], format: str, line: int) -> Iterator[Finding]:
    """What is wrong with a row of a format."""
    here = format_of(row)
    if here is None and format == CHAT:
        yield Finding(line, "messages", "missing_messages_list", "is missing; give the list of messages")
    elif here != format:
        said = f"is of the format {here}" if here else f"has none of the keys of {format}"
        yield Finding(line, "", "other_format", f"{said}, and the lines before are {format}; keep one format")
    elif format == COMPLETION:
        yield from _completion(row, line)
    elif format == PREFERENCE:
        yield from _preference(row, line)
    else:
        yield from _chat(row, line, "")


def _completion(row: Mapping[str, Any], line: int) -> Iterator[Finding]:
    for name in ("prompt", "completion"):
        if name not in row:
            yield Finding(line, name, "missing_key", "is missing; each line has a prompt and a completion")
        elif not isinstance(row[name], str):
            yield Finding(line, name, "data_type", f"is {kind(row[name])}; write a text")
    yield from _unknown(row, ("prompt", "completion"), line, "", "unrecognized_key")


def _chat(row: Mapping[str, Any], line: int, at: str, answered: bool = True) -> Iterator[Finding]:
    turns, path = row.get("messages"), f"{at}messages"
    if not isinstance(turns, list) or not turns:
        said = "is empty" if isinstance(turns, list) else f"is {kind(turns)}" if "messages" in row else "is missing"
        yield Finding(line, path, "missing_messages_list", f"{said}; give the list of messages")
        return
    for i, m in enumerate(turns):
        yield from _message(m, line, f"{path}[{i}]")
    roles = [m.get("role") if isinstance(m, dict) else None for m in turns]
    if answered and "assistant" not in roles and all(r in ROLES for r in roles):
        said = "has no message of the assistant, so there is nothing to learn; add one"
        yield Finding(line, path, "example_missing_assistant_message", said)
    yield from _unknown(row, _BESIDE, line, at, "unrecognized_key")
    for name in ("tools", "functions"):
        if row.get(name) is not None and not isinstance(row[name], list):
            yield Finding(line, f"{at}{name}", "data_type", f"is {kind(row[name])}; write a list of functions")


def _message(m: Any, line: int, path: str) -> Iterator[Finding]:
    if not isinstance(m, dict):
        yield Finding(line, path, "data_type", f"is {kind(m)}; write an object with role and content")
        return
    role = m.get("role")
    if role is None:
        yield Finding(line, f"{path}.role", "message_missing_key", f"is missing; allowed: {', '.join(ROLES)}")
    elif not isinstance(role, str) or role not in ROLES:
        said = f"{role!r:.40} is unknown{nearest(role, list(ROLES)) if isinstance(role, str) else ''}"
        yield Finding(line, f"{path}.role", "unrecognized_role", said)
    calls = m.get("tool_calls") or m.get("function_call")
    content = m.get("content")
    if content is None and not calls:
        if "content" not in m:
            yield Finding(line, f"{path}.content", "message_missing_key", "is missing; write a text")
        else:
            yield Finding(line, f"{path}.content", "missing_content", "is null, and there are no tool_calls; write one")
    elif content is not None and not isinstance(content, str | list):
        yield Finding(line, f"{path}.content", "missing_content", f"is {kind(content)}; write a text")
    if m.get("weight") not in (None, 0, 1):
        said = "is neither 0 (not trained on) nor 1"
        yield Finding(line, f"{path}.weight", "message_weight", said)
    yield from _unknown(m, _KEYS, line, f"{path}.", "message_unrecognized_key")


def _preference(row: Mapping[str, Any], line: int) -> Iterator[Finding]:
    given = row.get("input")
    if not isinstance(given, dict):
        yield Finding(line, "input", "missing_messages_list", "is missing; write an object with messages")
    else:
        yield from _chat(given, line, "input.", answered=False)
    names = next((pair for pair in _ANSWERS if any(n in row for n in pair)), _ANSWERS[0])
    for name in names:
        answer = row.get(name)
        if not isinstance(answer, list) or len(answer) != 1:
            yield Finding(line, name, "data_type", "should be a list of one message of the assistant")
            continue
        yield from _message(answer[0], line, f"{name}[0]")
        if isinstance(answer[0], dict) and answer[0].get("role", "assistant") != "assistant":
            yield Finding(line, f"{name}[0].role", "unrecognized_role", "is not assistant")


def _unknown(row: Mapping[str, Any], allowed: tuple[str, ...], line: int, at: str, check: str) -> Iterator[Finding]:
    for name, value in row.items():
        if name not in allowed and value not in (None, [], {}, ""):  # clients write empty ones of their own
            said = f"is no key that is known{nearest(name, list(allowed))}"
            yield Finding(line, f"{at}{name[:40]}", check, said)


def remarks(row: Mapping[str, Any], format: str) -> Iterator[str]:
    """What is odd about a good row, by names of `validation.REMARKS`."""
    if format == COMPLETION:
        if not row["completion"].strip():
            yield "near_empty"
        return
    turns = row["messages"] if format == CHAT else row["input"]["messages"]
    roles = [m["role"] for m in turns]
    if not any(r in ("system", "developer") for r in roles):
        yield "missing_system"
    if "user" not in roles:
        yield "missing_user"
    if format == CHAT:
        if roles[-1] != "assistant":
            yield "last_not_assistant"
        last = next(m for m in reversed(turns) if m["role"] == "assistant")
        if not (last.get("tool_calls") or last.get("function_call")) and not str(last.get("content") or "").strip():
            yield "near_empty"


def completion(row: Mapping[str, Any], format: str) -> str | None:
    """What is learnt, where it is one text."""
    if format == COMPLETION:
        return row["completion"].strip()
    last = row["messages"][-1] if format == CHAT else {}
    return last["content"].strip() if isinstance(last.get("content"), str) else None
