"""API keys: made, listed, revoked and checked. Only their hashes are kept."""

import hashlib
import hmac
import re
import time
from typing import Literal

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from jaxtune.errors import UserError
from jaxtune.serve.store import ids
from jaxtune.serve.store.tables import Key

_PREFIX = "key_"
_SECRET = re.compile(r"sk-jaxtune-([A-Za-z0-9]{12})-[A-Za-z0-9]{40}")


def add(
    session: Session,
    name: str,
    project: str = "default",
    scope: Literal["user", "admin"] = "user",
    per_minute: int | None = None,
) -> tuple[Key, str]:
    """A new key, and its secret, which is told here alone.

    Raises:
      UserError: the project's name has other characters than it may.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", project):
        raise UserError(f"project {project!r}: its name may have letters, digits, _ and -, up to 64 of them")
    part = ids.new("", 12)
    secret = f"sk-jaxtune-{part}-{ids.new('', 40)}"
    key = Key(
        id=_PREFIX + part, created_at=int(time.time()), hash=_hash(secret), name=ids.label(name), project=project,
        scope=scope, per_minute=per_minute, revoked_at=None,
    )  # fmt: skip
    session.add(key)
    return key, secret


def listed(session: Session) -> list[Key]:
    """All keys, the oldest first."""
    return list(session.scalars(select(Key).order_by(Key.seq)))


def revoke(session: Session, key_id: str) -> Key:
    """Take a key's power away; once more does nothing more. Raises: UserError: no such key."""
    key = session.scalar(select(Key).where(Key.id == key_id))
    if key is None:
        raise UserError(f"key {key_id}: there is none; see `jaxtune keys list`")
    if key.revoked_at is None:
        key.revoked_at = int(time.time())
    return key


def wanted(session: Session) -> bool:
    """Whether callers must have a key: from the first one on, also when all are revoked."""
    return bool(session.scalar(select(exists(Key.seq))))


def check(session: Session, secret: str) -> Key | None:
    """The key of a secret, if it has one that is not revoked. Secrets are compared in constant time."""
    match = _SECRET.fullmatch(secret)
    key = session.scalar(select(Key).where(Key.id == _PREFIX + match[1])) if match else None
    same = hmac.compare_digest(key.hash if key else "0" * 64, _hash(secret))
    return key if key and same and key.revoked_at is None else None


def _hash(secret: str) -> str:
    """SHA-256 will do: secrets have 238 random bits, and cannot be guessed however fast one hashes."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
