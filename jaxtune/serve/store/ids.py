"""Ids that cannot be guessed, names of tuned models, and what users call things, made harmless."""

import re
import secrets
import string
import unicodedata

_ALPHABET = string.ascii_letters + string.digits
FILE, JOB, EVENT, CHECKPOINT, UPLOAD, PART = "file-", "ftjob-", "ftevent-", "ftckpt_", "upload_", "part_"
_LABEL = 255  # characters of a file's name


def new(prefix: str, length: int = 24) -> str:
    """A random id; 24 letters and digits are 142 bits.

    >>> new(FILE).startswith("file-"), len(new(FILE))
    (True, 29)
    """
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(length))


def is_id(text: str, prefix: str) -> bool:
    """Whether a text has the form of an id, so that it may name a file on disk.

    >>> is_id(new(FILE), FILE), is_id("file-../../x", FILE)
    (True, False)
    """
    return re.fullmatch(re.escape(prefix) + r"[A-Za-z0-9]{8,64}", text) is not None


def label(text: str) -> str:
    """A user's word for a file: the last part of a path, without control characters. A label, never a path.

    >>> label("../../etc/x\\n.jsonl"), label("..")
    ('x.jsonl', 'file')
    """
    last = re.split(r"[/\\]", text)[-1]
    kept = "".join(c for c in last if not unicodedata.category(c).startswith("C"))[:_LABEL].strip()
    return kept if kept.strip(".") else "file"


def model_name(base: str, organization: str, suffix: str | None) -> str:
    """The name of a new tuned model.

    >>> model_name("demo", "local", "My bot!")[:-8]
    'ft:demo:local:my-bot:'
    """
    safe = re.sub(r"[^a-z0-9_-]+", "-", (suffix or "").lower()).strip("-")
    return f"ft:{base}:{organization}:{safe}:{new('', 8)}"
