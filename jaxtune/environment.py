"""What a run ran on: versions, devices, compiler flags. For reports of bugs, and for telling two runs apart."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax

from jaxtune import log

PACKAGES = (
    "jaxtune", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "flax", "optax", "orbax-checkpoint", "numpy",
    "transformers", "tokenizers", "datasets", "grain", "qwix", "tokamax",
)  # fmt: skip
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64")


def facts() -> dict[str, Any]:
    """Versions, devices and flags. The home folder is written as ~, so that nobody's name is told."""
    devices = jax.devices()
    return {
        "versions": {"python": platform.python_version(), **{p: v for p in PACKAGES if (v := _version(p))}},
        "system": f"{platform.system()} {platform.machine()}",
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "flags": {name: _homeless(os.environ[name]) for name in FLAGS if os.environ.get(name)},
        "compile_cache": _homeless(jax.config.jax_compilation_cache_dir or ""),  # type: ignore[attr-defined]
    }


def record(file: Path, seed: int, start: int) -> None:
    """Append to a JSON list: one entry for each time that a run starts or goes on with something changed.

    The first process writes for all.
    """
    if jax.process_index():
        return
    entry = {**facts(), "seed": seed}
    try:
        entries = json.loads(file.read_text()) if file.exists() else []
    except json.JSONDecodeError:  # cut by a full disk
        entries = []
    last = {k: v for k, v in entries[-1].items() if k != "after_step"} if entries else None
    if entry != last:
        log.write_whole(file, json.dumps([*entries, {"after_step": start, **entry}], indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _homeless(text: str) -> str:
    return text.replace(str(Path.home()), "~")
