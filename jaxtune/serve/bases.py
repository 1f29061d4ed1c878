"""Base models: the folders under `models`, by name."""

import re
from collections.abc import Mapping
from pathlib import Path

from jaxtune.serve.settings import Settings

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DEPTH = 3  # folders below `models` that a name may have
DEMO = "demo"


def found(s: Settings) -> Mapping[str, Path]:
    """Name -> folder of each base model that is there now; links that lead out of the folder are left out.

    A folder counts where it holds a config.json and no adapter.
    """
    root = s.models.resolve()
    out: dict[str, Path] = {}
    if s.demo:
        out[DEMO] = Path(__file__).parents[1] / "demo" / "model"

    def look(folder: Path, depth: int) -> None:
        try:
            children = sorted(folder.iterdir())
        except OSError:  # not ours to read, as a disk's lost+found, or gone meanwhile: it has no models for us
            return
        for child in children:
            inside = child.is_dir() and child.resolve().is_relative_to(root) and not child.name.startswith(".")
            if inside and (child / "config.json").is_file() and not (child / "adapter_config.json").exists():
                out.setdefault(child.relative_to(s.models).as_posix(), child)
            elif inside and depth < _DEPTH:
                look(child, depth + 1)

    look(s.models, 1)
    return out


def of_hub(s: Settings, name: str) -> bool:
    """Whether a name may be a hub model's, where those are allowed; whether the hub has it, a worker finds out."""
    return s.hub and _HUB.fullmatch(name) is not None
