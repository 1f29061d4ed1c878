"""Rows to conversations: messages as OpenAI and ShareGPT have them, prompt and completion, Alpaca's columns."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.data.examples import Conversation, Message
from jaxtune.data.formats.values import Row, Tags, known, listed, optional, structure, text
from jaxtune.data.reading.text import parse
from jaxtune.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
CALL = "function_call"  # ShareGPT's turn that is nothing but calls
TAGS = ("role", "content", *ROLES, CALL, "separator")

_OPENAI = {**{r: r for r in ROLES}, "developer": "system", "function": "tool"}
_SHAREGPT = {**_OPENAI, "human": "user", "gpt": "assistant", "observation": "tool", CALL: CALL}
_SEEN = ("role", "content")  # what a template reads and no extra may stand for
_SEPARATOR = "\n\n"  # between an instruction and its input


def messages(row: Row, origin: str, tags: Tags) -> Conversation:
    """OpenAI's `{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}`.

    Beside them `tools` (JSON schemas, or a string of them) and `system`. A message may have tool_calls (its content may
    then be null), tool_call_id, name, reasoning_content, and an assistant's `weight` 0 or 1: whether it is trained on.
    """
    return _conversation(row, "messages", origin, tags)


def sharegpt(row: Row, origin: str, tags: Tags) -> Conversation:
    """`{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}`

    Also turns of `system`, of `function_call` (JSON of one call or a list of them) and of `observation`; beside them
    `system` and `tools`.
    """
    return _conversation(row, "conversations", origin, tags)


def _conversation(row: Row, column: str, origin: str, tags: Tags) -> Conversation:
    turns = thread(row[column], column, origin, tags)
    if not turns:
        raise UserError(f"{origin}: {column!r} is an empty list; a conversation has at least one message")
    return Conversation(with_system(row, turns, origin), "messages", origin, tools(row, origin))


def prompt_completion(row: Row, origin: str, tags: Tags) -> Conversation:
    """`{"prompt": "2 + 2 =", "completion": " 4"}`, or lists of messages (TRL), of which the completion is trained on"""
    completion = row.get("completion")
    if isinstance(row["prompt"], str) and isinstance(completion, str | None):
        asked = with_system(row, (Message("user", row["prompt"]),), origin)
        answered = [] if completion is None else [Message("assistant", completion)]
        return Conversation((*asked, *answered), "prompt_completion", origin, tools(row, origin))
    asked = untrained(said(row["prompt"], "prompt", "user", origin, tags))
    judged = () if completion is None else said(completion, "completion", "assistant", origin, tags)
    return Conversation(with_system(row, (*asked, *judged), origin), "messages", origin, tools(row, origin))


def alpaca(row: Row, origin: str, tags: Tags) -> Conversation:
    """`{"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"}`; `input` may be empty or left out

    Beside them `system` and `history`, pairs of an instruction and an answer, which are trained on too. Between
    instruction and input stands an empty line, or what data.tags says of `separator`.
    """
    output = row.get("output")
    answered = [] if output is None else [Message("assistant", text(output, "output", origin))]
    asked = with_system(row, alpaca_prompt(row, origin, tags), origin)
    return Conversation((*asked, *answered), "alpaca", origin, tools(row, origin))


def alpaca_prompt(row: Row, origin: str, tags: Tags) -> tuple[Message, ...]:
    """History and instruction."""
    known(tags, TAGS)
    turns: list[Message] = []
    for i, pair in enumerate(listed(row.get("history") or [], "history", origin, "pairs")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(
                f"{origin}: history[{i}] should be a pair of an instruction and an answer, got {pair!r:.60}"
            )
        question, answer = (text(x, f"history[{i}]", origin) for x in pair)
        turns += [Message("user", question), Message("assistant", answer)]
    parts = [text(row["instruction"], "instruction", origin), optional(row, "input", origin)]
    return (*turns, Message("user", tags.get("separator", _SEPARATOR).join(p for p in parts if p)))


def with_system(row: Row, turns: tuple[Message, ...], origin: str) -> tuple[Message, ...]:
    """The column `system` in front, where there is one and the turns do not begin with a system message."""
    system = optional(row, "system", origin)
    return (Message("system", system), *turns) if system and turns[0].role != "system" else turns


def untrained(turns: Sequence[Message]) -> tuple[Message, ...]:
    """The same without loss."""
    return tuple(m._replace(trained=False) for m in turns)


def said(value: Any, column: str, role: str, origin: str, tags: Tags) -> tuple[Message, ...]:
    """A text as one message of `role`; or a message, or a list of them."""
    if isinstance(value, str):
        return (Message(role, value),)
    turns = thread([value] if isinstance(value, dict) else value, column, origin, tags)
    if not turns:
        raise UserError(f"{origin}: {column!r} is an empty list; at least one message was expected")
    return turns


# --- messages ---------------------------------------------------------------------------------------------------------


def thread(value: Any, column: str, origin: str, tags: Tags) -> tuple[Message, ...]:
    """A list of messages, under ShareGPT's names where they have `from`, else under OpenAI's."""
    known(tags, TAGS)
    value = structure(value, column, origin)
    if not isinstance(value, list):
        raise UserError(f"{origin}: {column!r} should be a list of {{role, content}}, got {value!r:.60}")
    from_value = column == "conversations" or any(isinstance(m, dict) and "from" in m for m in value[:1])
    role_key = tags.get("role", "from" if from_value else "role")
    content_key = tags.get("content", "value" if from_value else "content")
    roles = dict(_SHAREGPT if from_value else _OPENAI)
    roles |= {tags[r]: {"developer": "system"}.get(r, r) for r in (*ROLES, CALL) if r in tags}
    turns = []
    for i, m in enumerate(value):
        where = f"{column}[{i}]"
        if not isinstance(m, dict) or m.get(role_key) is None:
            raise UserError(f"{origin}: {where} should have {role_key!r} and {content_key!r}, got {m!r:.60}")
        name = m[role_key]
        if not isinstance(name, str) or name not in roles:
            raise UserError(f"{origin}: {where}.{role_key} is {name!r:.60}; allowed: {', '.join(roles)}")
        if roles[name] == "system" and i:
            raise UserError(f"{origin}: {where}.{role_key} is {name!r}; it can only come first")
        rest = {k: v for k, v in m.items() if k not in (role_key, content_key, *_SEEN) and v is not None}
        turns.append(_message(roles[name], m.get(content_key), rest, where, content_key, origin))
    return tuple(turns)


def _message(role: str, content: Any, rest: dict[str, Any], where: str, key: str, origin: str) -> Message:
    weight = rest.pop("weight", 1)
    if weight not in (0, 1):
        raise UserError(f"{origin}: {where}.weight is {weight!r:.60}; allowed: 0 (not trained on) and 1")
    calls = rest.pop("tool_calls", None) or ([rest.pop(CALL)] if isinstance(rest.get(CALL), dict) else [])
    if role == CALL:
        role, calls, content = "assistant", _calls(content, f"{where}.{key}", origin), ""
    if calls:
        calls = structure(calls, f"{where}.tool_calls", origin)
        if not isinstance(calls, list):
            raise UserError(f"{origin}: {where}.tool_calls should be a list, got {type(calls).__name__}")
        rest["tool_calls"] = [_call(c, f"{where}.tool_calls[{i}]", origin) for i, c in enumerate(calls)]
        content = "" if content is None else content
    if content is None:
        raise UserError(f"{origin}: {where} should have 'role' and {key!r}, and {key!r} is missing")
    return Message(role, _content(content, role, f"{where}.{key}", origin), bool(weight), rest)


def _content(value: Any, role: str, where: str, origin: str) -> str:
    """Text; or parts of it; or, of a tool, any JSON."""
    if isinstance(value, list) and value and all(isinstance(p, dict) and "type" in p for p in value):
        for i, part in enumerate(value):
            if part["type"] != "text":
                raise UserError(f"{origin}: {where}[{i}] is of type {part['type']!r:.60}; only text is read")
        return "".join(text(part.get("text"), f"{where}[{i}].text", origin) for i, part in enumerate(value))
    if role == "tool" and isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return text(value, where, origin)


def _calls(value: Any, where: str, origin: str) -> list[Any]:
    """What a turn of calls says: JSON of one or of several."""
    if isinstance(value, str):
        value = parse(value, f"{origin}: {where} should be JSON of a function's name and arguments")
    return value if isinstance(value, list) else [value]


def _call(value: Any, where: str, origin: str) -> dict[str, Any]:
    """A call as templates expect it: arguments are an object, in files they are often a string of one."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{origin}: {where} should be a function with 'name' and 'arguments', got {value!r:.60}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse(arguments, f"{origin}: {where}.arguments") if arguments.strip() else {}
    if not isinstance(arguments, dict | None):
        raise UserError(f"{origin}: {where}.arguments should be an object, got {arguments!r:.60}")
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
    return {"id": value["id"], **call} if value.get("id") is not None else call


def tools(row: Row, origin: str) -> tuple[Mapping[str, Any], ...]:
    """The column `tools` as OpenAI writes it; a bare function is put into `{"type": "function", "function": …}`."""
    value = structure(row.get("tools") or [], "tools", origin)
    out = []
    for i, tool in enumerate(listed([value] if isinstance(value, dict) else value, "tools", origin, "functions")):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{origin}: tools[{i}] should be a function with a 'name', got {tool!r:.60}")
        out.append({"type": "function", "function": function})
    return tuple(out)
