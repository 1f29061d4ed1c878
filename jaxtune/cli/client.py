"""How the verbs files, jobs and models talk to a service, ours or another: OpenAI's client, errors in one line."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from jaxtune import log
from jaxtune.cli.common import shown
from jaxtune.errors import UserError

if TYPE_CHECKING:
    from openai import APIStatusError, OpenAI

Url = Annotated[
    str, typer.Option("--base-url", envvar="OPENAI_BASE_URL", metavar="URL", help="Of the service, with its /v1.")
]
KeyFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A file that holds the key, instead of OPENAI_API_KEY.")
]
HERE = "http://127.0.0.1:8000/v1"


@contextmanager
def talking(url: str, key_file: Path | None) -> Iterator["OpenAI"]:
    """A client whose errors become one line each.

    Raises:
      UserError: it cannot be reached, does not accept the key, or says no; with what to do.
    """
    if find_spec("openai") is None:
        raise UserError("openai: not installed; run pip install 'jaxtune[serve]'")
    import openai

    with openai.OpenAI(base_url=url, api_key=_key(url, key_file)) as client:
        try:
            yield client
        except openai.APITimeoutError as e:
            raise UserError(f"{url}: no answer in time; try again") from e
        except openai.APIConnectionError as e:
            raise UserError(
                f"{url}: cannot be reached ({_reason(e)}); start `jaxtune serve`, or name another with --base-url"
            ) from e
        except openai.APIStatusError as e:
            raise UserError(f"{url}: {_told(e)}") from e
        except openai.APIError as e:
            raise UserError(f"{url}: {shown(e.message)}") from e


def broken() -> tuple[type[Exception], ...]:
    """What a lost connection, or a service that is just being started again, raises; older clients let the errors of
    their HTTP library through."""
    import openai

    libraries = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    return openai.APIConnectionError, openai.InternalServerError, *(x.TransportError for x in libraries)


def _key(url: str, file: Path | None) -> str:
    address = urlsplit(url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise UserError(f"--base-url {url!r}: no address; http://HOST:PORT/v1 was expected")
    here = _is_here(address.hostname)
    if file is not None:
        try:
            key = file.read_text(encoding="utf-8").strip()
        except FileNotFoundError as e:
            raise UserError(f"--key-file {file}: no such file") from e
    else:
        key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and not here:
        raise UserError(f"{url}: no key; set OPENAI_API_KEY, or name a file that holds it with --key-file")
    if key and address.scheme == "http" and not here:
        log.warn(f"{url}: the key goes over the network unencrypted; https hides it")
    return key or "none"  # the client wants one, a service without keys does not look at it


def _is_here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reason(error: Exception) -> str:
    return shown(str(error.__cause__ or error)) or type(error).__name__


_REMEDIES = {
    401: "set OPENAI_API_KEY, or name a file that holds the key with --key-file",
    403: "the key may not do this",
    429: "try again later",
}


def _told(error: "APIStatusError") -> str:
    """What a service said, and what to do about it."""
    body: Any = error.body
    message = body.get("message") if isinstance(body, dict) else None
    said = shown(str(message or f"answered {error.status_code}")).rstrip(".")
    remedy = _REMEDIES.get(error.status_code) or ("its log says more" if error.status_code >= 500 else None)
    request = f" (request {shown(error.request_id)})" if error.status_code >= 500 and error.request_id else ""
    return f"{said}{request}" + (f"; {remedy}" if remedy else "")
