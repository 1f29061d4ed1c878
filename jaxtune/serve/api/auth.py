"""Who calls: the key of a request, and how many requests it may make."""

import ipaddress
import threading

from starlette.datastructures import Headers

from jaxtune.serve.api.errors import ApiError
from jaxtune.serve.api.limits import Bucket
from jaxtune.serve.api.service import Caller, Service
from jaxtune.serve.settings import Settings
from jaxtune.serve.store import keys

_OPEN = Caller("default", None, "admin")


def is_loopback(host: str) -> bool:
    """Whether an address to bind is reached from this machine alone.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_alone(s: Settings) -> bool:
    """Whether nobody but this machine's own users is meant to reach a service; other names stand for a proxy's."""
    return is_loopback(s.host) and not s.hosts


class Gate:
    """Lets callers in. Buckets live in this process; there is one for each key that was ever right."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._buckets: dict[str, Bucket] = {}
        self._lock = threading.Lock()

    def caller(self, headers: Headers) -> tuple[Caller, dict[str, str]]:
        """Who is calling, and the headers that tell what it may still do.

        Where no key was ever made, a service on loopback takes everybody for its owner, whatever key is sent: OpenAI's
        client does not start without one.

        Raises:
          ApiError: no key or a wrong one (401), a project that is not the key's (401), too many requests (429).
        """
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        with self._service.database.read() as session:
            if is_alone(self._service.settings) and not keys.wanted(session):
                return _OPEN, {}
            key = keys.check(session, secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            message = "Incorrect API key provided." if secret else "You didn't provide an API key."
            message += " Send one that `jaxtune keys add` made, as `Authorization: Bearer KEY`."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        project = headers.get("openai-project", key.project)
        if project != key.project:
            message = "The OpenAI-Project header does not match the key's project."
            raise ApiError(401, message, code="mismatched_project")
        per_minute = key.per_minute or self._service.settings.limits.per_minute
        with self._lock:
            bucket = self._buckets.get(key.id)
            if bucket is None or bucket.per_minute != per_minute:
                bucket = self._buckets[key.id] = Bucket(per_minute)
            return Caller(key.project, key.id, key.scope), bucket.take()
