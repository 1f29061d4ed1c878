"""Forms with a file in them, written to storage as they come: no temporary copy, and no more bytes than may be."""

import asyncio
import time
from typing import Any

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from jaxtune.serve.api.errors import ApiError
from jaxtune.serve.api.service import Service
from jaxtune.serve.store.storage import TooLarge, Writing

_FIELDS, _FIELD_BYTES, _HEADER_BYTES = 10, 1024, 4096
_CHUNK_S = 30.0  # that may pass between two pieces
_START_S, _SLOWEST = 60.0, 8192  # after so long: bytes a second, on average
_CHECK = 64 * 2**20  # bytes after which the disk's free space is looked at again


class Form:
    """A form as it comes: one part goes into `writing`, the others are short fields."""

    def __init__(self, boundary: bytes, file: str, writing: Writing) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.ended = False
        self._file, self._writing = file, writing
        self._header = [bytearray(), bytearray()]
        self._headers: dict[bytes, bytes] = {}
        self._name, self._value = "", bytearray()
        calls: Any = {
            "on_part_begin": self._begin, "on_part_data": self._data, "on_part_end": self._end,
            "on_header_field": lambda d, a, b: self._head(0, d[a:b]),
            "on_header_value": lambda d, a, b: self._head(1, d[a:b]),
            "on_header_end": self._headed, "on_headers_finished": self._named, "on_end": self._all,
        }  # fmt: skip
        self._parser = MultipartParser(boundary, calls)

    def write(self, chunk: bytes) -> None:
        """Take a piece of the body. Raises: FormParserError, TooLarge, ApiError."""
        self._parser.write(chunk)

    def _begin(self) -> None:
        self._headers, self._value = {}, bytearray()
        self._header = [bytearray(), bytearray()]

    def _head(self, which: int, data: bytes) -> None:
        self._header[which] += data
        if len(self._header[which]) > _HEADER_BYTES or len(self._headers) > _FIELDS:
            raise ApiError(400, "The form has headers that are too long.")

    def _headed(self) -> None:
        self._headers[bytes(self._header[0]).lower()] = bytes(self._header[1])
        self._header = [bytearray(), bytearray()]

    def _named(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name == self._file:
            if self.filename is not None:
                raise ApiError(400, f"The form has more than one {self._file!r}.", self._file)
            self.filename = options.get(b"filename", b"file").decode("utf-8", "replace")
        elif len(self.fields) >= _FIELDS:
            raise ApiError(400, f"The form has more than {_FIELDS} fields.")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name == self._file:
            self._writing.write(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > _FIELD_BYTES:
            raise ApiError(400, f"The form's field {self._name[:64]!r} is too long.")

    def _end(self) -> None:
        if self._name != self._file:
            self.fields[self._name] = self._value.decode("utf-8", "replace")

    def _all(self) -> None:
        self.ended = True


async def received(request: Request, service: Service, file: str, writing: Writing) -> Form:
    """Read the form of a request, its part `file` into `writing`.

    Raises:
      ApiError: it is no form, has no such part, is too large, too slow, broken off, or the disk is nearly full.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise ApiError(415, "Send a multipart/form-data body.", code="unsupported_media_type")
    try:
        form = Form(options[b"boundary"], file, writing)
        begun, checked = time.monotonic(), -_CHECK
        pieces = aiter(request.stream())
        while (chunk := await _next(pieces)) is not None:
            await run_in_threadpool(form.write, chunk)
            if writing.bytes - checked >= _CHECK:
                checked = writing.bytes
                has_room(service)
            if time.monotonic() - begun > _START_S + writing.bytes / _SLOWEST:
                raise TimeoutError
    except TooLarge as e:
        raise ApiError(413, f"The file is too large: {e} are not accepted.", file, "file_too_large") from e
    except TimeoutError as e:
        raise ApiError(408, "The file came too slowly.", file, headers={"x-should-retry": "false"}) from e
    except (FormParserError, ClientDisconnect) as e:
        raise ApiError(400, "The form is broken, or broke off.") from e
    if not form.ended:
        raise ApiError(400, "The form broke off before its end.")
    if form.filename is None:
        raise ApiError(400, f"Missing required parameter: {file!r}.", file, "missing_required_parameter")
    return form


def has_room(service: Service, coming: int = 0) -> None:
    """Raises: ApiError: the disk would have less left than it must."""
    if service.storage.free_bytes() - coming < service.settings.limits.free_bytes:
        raise ApiError(
            507, "The server's disk is nearly full; delete files or models.", type="server_error", code="disk_full",
            headers={"x-should-retry": "false"},
        )  # fmt: skip


async def _next(pieces: Any) -> bytes | None:
    async with asyncio.timeout(_CHUNK_S):
        return await anext(pieces, None)
