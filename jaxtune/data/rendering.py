"""Chat templates to text, by Jinja, in training and inference alike.

A template is a program that came with a model, from anywhere. It runs in Jinja's sandbox inside of a process of its
own (`renderer`), with limits on time, memory and size: one that runs away is ended and reported.

The content of messages is data: it is put into the text as it is. Where it holds a control token's name, such as
`<|im_end|>`, the tokenizer makes that token of it, as every server does with the same template; whose turn a token
is, and so whether it is trained on, never depends on it.
"""

import atexit
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.errors import UserError

SECONDS = 10.0  # for one conversation
TEMPLATE_CHARACTERS = 2**18
_START_SECONDS = 60.0


class Rendered(NamedTuple):
    """A text, and where in it the template says that the assistant's parts begin and end (`{% generation %}`)."""

    text: str
    marked: list[tuple[int, int]]


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    turns: Sequence[tuple[int, bool]],
    origin: str,
    variables: Mapping[str, Any],
) -> list[Rendered]:
    """A conversation's beginnings as texts.

    Args:
      template: Jinja.
      messages: with "role", "content" and what else the template sees.
      turns: for each text, of how many messages it is, and whether the assistant's header follows.
      origin: where the conversation stood, for errors.
      variables: what the template sees beside: bos_token, tools, …

    Raises:
      UserError: the template is faulty or too long, refuses the messages, or uses more time or memory than it may.
    """
    if len(template) > TEMPLATE_CHARACTERS:
        raise UserError(
            f"the chat template has {len(template)} characters, at most {TEMPLATE_CHARACTERS} are taken; "
            "name another with data.template"
        )
    try:
        data = json.dumps({"messages": messages, "turns": turns, "variables": variables})
    except TypeError as e:
        raise UserError(f"{origin}: the conversation holds what is not JSON ({e}); write it as text") from e
    limit = 2**20 + 4 * len(data)
    got = _ask(json.dumps([template, limit]).encode() + b"\n" + data.encode(), origin)
    if "mistake" in got:
        raise UserError(f"the chat template is not valid Jinja: {got['mistake']}; name another with data.template")
    if "refusal" in got:
        raise UserError(f"{origin}: the chat template refuses the conversation: {got['refusal']}")
    first = got["texts"][0][0]
    texts = ((first[:t] if isinstance(t, int) else t, spans) for t, spans in got["texts"])
    return [Rendered(text, [(a, b) for a, b in spans]) for text, spans in texts]


class _Process(NamedTuple):
    popen: subprocess.Popen
    connection: Connection


_lock = threading.Lock()
_running: list[_Process] = []  # none or one
_others: list[_Process] = []  # of the process that this one was forked from: kept, so that nobody waits for them here


def _ask(request: bytes, origin: str) -> dict:
    with _lock:
        if not _running:
            _running.append(_start())
        process = _running[0]
        try:
            process.connection.send_bytes(request)
            if process.connection.poll(SECONDS):
                return json.loads(process.connection.recv_bytes())
            problem = f"takes longer than {SECONDS:g} seconds"
        except (EOFError, OSError):
            problem = "needs more memory than it may use"
        except BaseException:  # an interrupt: the answer would be taken for that to the next question
            _stop()
            raise
        _stop()
    raise UserError(f"{origin}: the chat template {problem} and was stopped; name another with data.template")


def _start() -> _Process:
    mine, its = multiprocessing.Pipe()
    popen = subprocess.Popen(  # noqa: S603 our own file, no shell
        [sys.executable, "-P", "-s", str(Path(__file__).with_name("renderer.py")), str(its.fileno())],
        pass_fds=[its.fileno()],
        stdin=subprocess.DEVNULL,
        env={"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONDONTWRITEBYTECODE": "1"}
        | {k: v for k, v in os.environ.items() if k in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT")},
    )
    its.close()
    try:
        if mine.poll(_START_SECONDS):
            mine.recv_bytes()
            return _Process(popen, mine)
    except EOFError:
        pass
    popen.kill()
    raise UserError(f"the process that renders chat templates does not start ({sys.executable}, exit {popen.wait()})")


def _stop() -> None:
    for process in _running:
        process.connection.close()
        process.popen.kill()
        process.popen.wait()
    _running.clear()


def _forget() -> None:
    global _lock
    _lock = threading.Lock()
    for process in _running:
        with contextlib.suppress(OSError):
            process.connection.close()
    _others.extend(_running)
    _running.clear()


atexit.register(_stop)
os.register_at_fork(after_in_child=_forget)
