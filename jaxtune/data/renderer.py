"""Renders chat templates in a process of its own, which `rendering` starts and, if it runs away, ends.

Not to be imported: a template comes with a model from anywhere, and Jinja's sandbox stops neither loops without end
nor texts without end. Here memory is limited, the environment of the parent is not seen, and all that comes and goes
is JSON. Filters and functions are those that transformers gives to templates, except that today is always the same
day: a day that moved would make other data of the same file.
"""

import datetime
import functools
import json
import secrets
import sys
from multiprocessing.connection import Connection
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

TODAY = datetime.datetime(2024, 7, 26, 12, 0)
MEMORY = 2**30  # bytes
MARK = f"\ue000{secrets.token_hex(8)}\ue001"  # stands at both ends of what {% generation %} holds


class Generation(jinja2.ext.Extension):
    """`{% generation %}`: what is inside is the assistant's."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return MARK + caller() + MARK


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=16)
def compiled(template: str) -> jinja2.Template:
    """A template as transformers compiles it."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = TODAY.strftime
    return environment.from_string(template)


def messages_seen(messages: list[dict], as_text: bool) -> list[dict]:
    """Messages with reasoning under its usual name, and the arguments of calls as an object, or all as text."""
    seen = []
    for m in messages:
        reasoning = next((m[k] for k in ("reasoning_content", "reasoning", "thinking") if m.get(k) is not None), None)
        out = m if reasoning is None else {"thinking": reasoning, **m, "reasoning_content": reasoning}
        if m.get("tool_calls"):
            out = {**out, "tool_calls": [_call(c, as_text) for c in m["tool_calls"]]}
        seen.append(out)
    return seen


def _call(call: dict, as_text: bool) -> dict:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"], as_text)}
    given = call.get("arguments")
    if as_text and not isinstance(given, str):
        return {**call, "arguments": _json(given)}
    if not as_text and isinstance(given, str):
        try:
            return {**call, "arguments": json.loads(given)}
        except json.JSONDecodeError:
            return call  # not JSON: what the model is to write, as it is
    return call


def rendered(template: jinja2.Template, limit: int, variables: dict) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where the assistant's parts begin and end in it."""
    parts, size = [], 0
    for part in template.generate(**variables):
        parts.append(part)
        size += len(part)
        if size > limit:
            raise OverflowError(f"it writes more than {limit} characters, of a conversation that is far shorter")
    pieces = "".join(parts).split(MARK)
    spans, at = [], 0
    for i, piece in enumerate(pieces):
        if i % 2:
            spans.append((at, at + len(piece)))
        at += len(piece)
    return "".join(pieces), spans


def answer(source: str, limit: int, request: dict) -> dict:
    """What one request gives: texts with spans, or what went wrong."""
    try:
        template = compiled(source)
        for as_text in (False, True):
            seen = messages_seen(request["messages"], as_text)
            try:
                first, *others = (
                    rendered(
                        template,
                        limit,
                        {**request["variables"], "messages": seen[:n], "add_generation_prompt": prompt},
                    )
                    for n, prompt in request["turns"]
                )
                # Most texts are the first one's beginning: their length says it all.
                short = [(len(t) if first[0].startswith(t) else t, spans) for t, spans in others]
                return {"texts": [first, *short]}
            except TypeError:  # some templates, DeepSeek's for one, can only write arguments that are text
                if as_text or not any(m.get("tool_calls") for m in seen):
                    raise
    except jinja2.TemplateSyntaxError as e:
        return {"mistake": f"line {e.lineno}: {e.message}"}
    except Exception as e:  # a template can raise anything; the parent says which conversation it was
        return {"refusal": f"{e}" if isinstance(e, jinja2.TemplateError) else f"{type(e).__name__}: {e}"}
    raise AssertionError("unreachable")


def main(fd: int) -> None:
    """Answer requests until the parent is gone."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > MEMORY:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))
    connection = Connection(fd)
    connection.send_bytes(b"ready")
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        of, data = request.split(b"\n", 1)
        source, limit = json.loads(of)
        connection.send_bytes(json.dumps(answer(source, limit, json.loads(data))).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]))
