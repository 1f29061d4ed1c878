"""What every request passes first and every answer last, as plain ASGI so that streams stay streams.

A request: its id; whether its Host and Origin are ours; its key; its body, bounded, in time, and not too deep.
An answer: the id, headers that keep browsers careful, and an envelope where the code under it broke.
"""

import asyncio
import contextlib
import ipaddress
import logging
import re
import secrets
from typing import Any
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxtune.serve.api.auth import Gate, is_loopback
from jaxtune.serve.api.errors import ApiError, internal
from jaxtune.serve.api.service import Service
from jaxtune.serve.checks.jsonl import too_deep

_log = logging.getLogger("jaxtune.serve")
_BODY_S = 60.0  # that a request's JSON may take to arrive
# Bytes and seconds that the rest of a refused body is still read: a client that is cut off while it sends hears
# nothing of why.
_LINGER_BYTES, _LINGER_S = 64 * 2**20, 5.0
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_FORMS = re.compile(r"/v1/files|/v1/uploads/[^/]+/parts")
_SAFE = ("GET", "HEAD", "OPTIONS")


def _same(origin: str, host: str) -> bool:
    """Whether a page of this origin is our own."""
    return origin.partition("://")[2] == host


class _Counted:
    """A body that knows whether all of it has come."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._ended = receive, False

    async def __call__(self) -> Message:
        message = await self._receive()
        self._ended = not message.get("more_body", False)
        return message

    async def done_soon(self) -> bool:
        """Whether the rest comes within bounds; it is thrown away."""
        left = _LINGER_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while not self._ended and left > 0:
                    left -= len((await self()).get("body", b""))
        return self._ended


class Guard:
    """The middleware."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self._gate, self._limits = app, Gate(service), service.settings.limits
        s = service.settings
        self._names = {"localhost", "127.0.0.1", "::1", s.host.lower(), *(h.lower() for h in s.hosts)}
        self._addresses = not is_loopback(s.host)  # then any address of this machine will do: none can be rebound

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = "req_" + secrets.token_hex(16)
        begun, body, extra = False, _Counted(receive), {"x-request-id": state["request_id"], **_HEADERS}
        if scope["path"].startswith("/v1/"):
            extra["cache-control"] = "no-store"

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                if message["status"] >= 400 and not await body.done_soon():
                    headers["connection"] = "close"
                for name, value in extra.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            try:
                await self.app(scope, await self._admit(scope, body, extra), answer)
            except ApiError as e:  # of this middleware; those of routes have their handler
                await e.answer()(scope, receive, answer)
        except Exception:
            _log.exception("%s: %s %s", state["request_id"], scope["method"], scope["path"])
            if begun:
                raise  # the connection is cut, so that nobody takes half an answer for a whole one
            await internal().answer()(scope, receive, answer)

    async def _admit(self, scope: Scope, receive: Receive, extra: dict[str, str]) -> Receive:
        """Let a request pass. Raises: ApiError: why it may not."""
        headers = Headers(scope=scope)
        if "\x00" in scope["path"] or b"%00" in scope.get("query_string", b""):
            raise ApiError(400, "The URL holds a NUL character.")
        host = headers.get("host", "")
        if not self._ours(host):
            message = f"This service does not answer to the name {host[:100]!r}; name it in the setting `hosts`."
            raise ApiError(421, message, code="unknown_host")
        if scope["method"] not in _SAFE and "origin" in headers and not _same(headers["origin"], host):
            raise ApiError(403, "Requests from other sites' pages are refused.", code="cross_origin")
        if scope["path"] == "/v1" or scope["path"].startswith("/v1/"):
            caller, told = await run_in_threadpool(self._gate.caller, headers)
            scope["state"]["caller"] = caller
            extra.update(told)
        if scope["method"] == "POST" and _FORMS.fullmatch(scope["path"]):
            return receive  # files are counted as they are written
        return await self._whole(headers, receive)

    async def _whole(self, headers: Headers, receive: Receive) -> Receive:
        """Read a body, which is JSON and small, before anybody parses it."""
        too_large = ApiError(413, f"The body has more than {self._limits.body_bytes} bytes.", code="request_too_large")
        said = headers.get("content-length", "0")
        if not said.isdecimal() or int(said) > self._limits.body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_S):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "The body broke off.")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._limits.body_bytes:
                        raise too_large
        except TimeoutError as e:
            raise ApiError(408, "The body of the request took too long to arrive.") from e
        if body:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, f"Bodies are application/json, not {kind[:100]!r}.", code="unsupported_media_type")
            if too_deep(bytes(body), self._limits.json_depth):
                raise ApiError(400, f"The JSON nests deeper than {self._limits.json_depth} levels.", code="too_deep")
        first: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Any:
            return first.pop() if first else await receive()

        return again

    def _ours(self, host: str) -> bool:
        """Whether a Host header names this service. Another name may have been bent to our address (DNS rebinding)."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            return self._addresses and bool(ipaddress.ip_address(name))
        except ValueError:
            return False
