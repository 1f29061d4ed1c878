"""Errors as OpenAI's clients expect them: an envelope, a status that they understand."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from jaxtune.serve.bodies import UNKNOWN


class ApiError(Exception):
    """An answer that is no success; a handler turns it into the envelope."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        type: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.type = status, message, param, code, type
        self.headers = headers or {}

    def envelope(self) -> dict[str, Any]:
        """The body of the answer."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def answer(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.envelope(), self.status, self.headers)


def internal() -> ApiError:
    """Something of ours broke; what, the log says under the request's id."""
    message = "The server had an error while processing your request. Its log has more, under this request's id."
    return ApiError(500, message, type="server_error")


def add_handlers(app: FastAPI) -> None:
    """Answer in the envelope whatever is raised on purpose."""

    @app.exception_handler(ApiError)
    async def told(_: Request, e: ApiError) -> JSONResponse:
        return e.answer()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, e: RequestValidationError) -> JSONResponse:
        return of_validation(e.errors()).answer()

    @app.exception_handler(HTTPException)
    async def other(request: Request, e: HTTPException) -> JSONResponse:
        message = str(e.detail)
        if e.status_code in (404, 405) and message == HTTPStatus(e.status_code).phrase:
            message = f"Invalid URL ({request.method} {request.url.path})"
        return ApiError(e.status_code, message, headers=dict(e.headers or {})).answer()


def of_validation(found: Sequence[Any]) -> ApiError:
    """The first thing that is wrong with a request, by the path of its field; what was sent is not repeated.

    >>> of_validation([{"type": "missing", "loc": ("body", "model"), "msg": "Field required"}]).message
    "Missing required parameter: 'model'."
    """
    first = found[0]
    kind, path = first["type"], _path(first["loc"])
    if kind == "json_invalid":
        return ApiError(400, "We could not parse the JSON body of your request: it is not valid JSON.")
    if kind == UNKNOWN:
        path = ".".join(p for p in (path, first["ctx"]["key"]) if p)
        return ApiError(400, f"Unknown parameter: {path!r}{first['ctx']['hint']}", path, "unknown_parameter")
    if not path:
        return ApiError(400, f"Invalid request body: {first['msg']}.", code="invalid_value")
    if kind == "missing":
        return ApiError(400, f"Missing required parameter: {path!r}.", path, "missing_required_parameter")
    message = str(first["msg"]).removeprefix("Value error, ").removesuffix(".")
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return ApiError(400, f"Invalid value for {path!r}: {message}.", path, code)


def _path(location: Sequence[str | int]) -> str:
    """`messages[0].role`, without where it was and without the members of unions, which pydantic names too."""
    out = ""
    for part in location[1:]:
        if isinstance(part, int):
            out += f"[{part}]"
        elif part.isidentifier() and part not in ("int", "str", "float", "bool"):
            out += f".{part}" if out else part
    return out
