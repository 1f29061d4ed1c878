"""What callers may take at once, kept in this process: requests a minute, and things under way."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jaxtune.serve.api.errors import ApiError


class Bucket:
    """A token bucket: a minute's worth of requests at most, refilled evenly."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute, self.left, self.at = per_minute, float(per_minute), time.monotonic()

    def take(self) -> dict[str, str]:
        """One request; the headers that tell what is left. Raises: ApiError: none is left."""
        now = time.monotonic()
        self.left = min(self.per_minute, self.left + (now - self.at) * self.per_minute / 60)
        self.at = now
        wait = max(0.0, (1 - self.left) * 60 / self.per_minute)
        headers = {
            "x-ratelimit-limit-requests": str(self.per_minute),
            "x-ratelimit-remaining-requests": str(max(0, int(self.left - 1))),
            "x-ratelimit-reset-requests": f"{(self.per_minute - self.left + 1) * 60 / self.per_minute:.3f}s",
        }
        if wait:
            headers["Retry-After"] = str(int(wait) + 1)
            message = f"Rate limit reached: {self.per_minute} requests per minute. Try again in {int(wait) + 1} s."
            raise ApiError(429, message, code="rate_limit_exceeded", type="requests", headers=headers)
        self.left -= 1
        return headers


class Slots:
    """So many things under way at once, of all and of one."""

    def __init__(self, what: str, each: int, together: int | None = None) -> None:
        self.what, self.each, self.together, self._taken = what, each, together, Counter[str | None]()
        self._lock = threading.Lock()  # some routes run in threads

    @contextlib.contextmanager
    def one(self, whose: str | None) -> Iterator[None]:
        """Take a place while the block runs. Raises: ApiError: there is none."""
        with self._lock:
            full = self.together is not None and self._taken.total() >= self.together
            if full or self._taken[whose] >= self.each:
                most = self.together if full else self.each
                message = (
                    f"Too many {self.what} at the same time: {most} may be under way. Try again when one has ended."
                )
                raise ApiError(429, message, code="rate_limit_exceeded", type="requests", headers={"Retry-After": "2"})
            self._taken[whose] += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken[whose] -= 1
                if not self._taken[whose]:
                    del self._taken[whose]


def one_at_a_time(session: Session, name: str) -> None:
    """Hold all other transactions that say the same name until this one ends; in SQLite they wait anyway."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(func.hashtext(name))))
