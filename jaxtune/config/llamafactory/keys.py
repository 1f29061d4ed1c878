"""LLaMA-Factory's keys as they were given."""

import math
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune.config.llamafactory.names import KNOWN, NOTED, REFUSED, SECRET, TRANSLATED
from jaxtune.errors import UserError, nearest


class Keys:
    """The keys that were given; null is as good as leaving one out. It remembers which were read."""

    def __init__(self, given: Mapping[str, Any], place: str, folder: Path) -> None:
        self.given = {k: v for k, v in given.items() if v is not None or k == "enable_thinking"}
        self.place, self.folder = place, folder
        self.all = list(given)
        self.notes: list[str] = []
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self.given

    def error(self, key: str, text: str) -> UserError:
        return UserError(f"{self.place}: {self._shown(key)}: {text}")

    def note(self, key: str, text: str) -> None:
        self.notes.append(f"{self._shown(key)} – {text}")

    def _shown(self, key: str) -> str:
        if key in SECRET or key not in self.all:
            return key
        value = self.given.get(key)
        words = {None: "null", True: "true", False: "false"}
        return f"{key}: {words[value] if value is None or isinstance(value, bool) else value}"

    def check_known(self) -> None:
        from jaxtune.config.schema import Config

        unknown = [
            f"unknown key {key}{nearest(key, [*KNOWN, *Config.model_fields])}" for key in self.all if key not in KNOWN
        ]
        if unknown:
            raise UserError(f"{self.place}: {'; '.join(short(u) for u in unknown)}")

    def refuse(self) -> None:
        for key, (inert, instead) in REFUSED.items():
            if key in self.given and self.given[key] not in inert:
                raise self.error(key, f"is not here: {instead}; leave the key out, or set it to null, to go without")

    def note_the_rest(self) -> None:
        for key in self.given:
            if key in NOTED:
                self.note(key, NOTED[key])
            elif key in TRANSLATED and key not in self._read:
                self.note(key, "has no effect beside the other keys")

    def value(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return self.given.get(key, default)

    def number(self, key: str, default: float) -> float:
        value = number(self.value(key, default))
        if value is None:
            raise self.error(key, "a number was expected")
        return value

    def whole(self, key: str, default: int) -> int:
        value = self.number(key, default)
        if value != int(value):
            raise self.error(key, "a whole number was expected")
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false was expected")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.value(key, default)
        if not isinstance(value, str) or not value:
            raise self.error(key, "a name was expected")
        return value

    def names(self, key: str) -> list[str]:
        """Names with commas between them, or a list."""
        value = self.value(key, [])
        listed = value.split(",") if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(v, str) and v.strip() for v in listed):
            raise self.error(key, "names with commas between them were expected")
        return [v.strip() for v in listed]

    def one_of(self, key: str, default: str, allowed: Mapping[str, str], remedy: str = "") -> str:
        value = self.value(key, default)
        if not isinstance(value, str) or value not in allowed:
            raise self.error(key, f"is not here; allowed: {', '.join(allowed)}{remedy}")
        return allowed[value]

    def path(self, key: str, default: str | None = None) -> str:
        """A path that exists, from here, the file's folder or one above it; what exists nowhere stays as it is."""
        if key not in self.given and default is None:
            raise UserError(f"{self.place}: {key} is missing; add it, in the file or as {key}=…")
        return self.found(self.text(key, default or ""))

    def found(self, value: str) -> str:
        path = Path(value).expanduser()
        if "://" in value or path.is_absolute():
            return str(path) if path.is_absolute() else value
        here = self.folder.absolute()
        places = [Path.cwd(), here, *here.parents]
        return next((os.path.normpath(p / path) for p in places if (p / path).exists()), value)


def number(value: Any) -> float | None:
    """A finite number, also as text (YAML reads 1e-5 as such); None where it is none.

    >>> number("1e-5"), number("3"), number("many"), number(True)
    (1e-05, 3, None, None)
    """
    if isinstance(value, str):
        try:
            value = int(value) if value.strip().isdecimal() else float(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def short(text: str) -> str:
    """Without the list of all keys, which is long."""
    return text.partition("; allowed: ")[0]


def line(*words: str) -> str:
    """A command to type."""
    return shlex.join(["jaxtune", *words])
