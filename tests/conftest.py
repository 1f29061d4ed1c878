"""Shared fixtures: a compile cache, the assets, tiny models."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "xla"))
os.environ.setdefault("XDG_CACHE_HOME", str(ROOT / ".pytest_cache" / "cache"))  # tokens
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs here are compiled once and run for milliseconds: plain code, which compiles in a third of the time.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads wait for work in busy loops
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ASSETS = Path(os.environ.get("JAXTUNE_ASSETS", ROOT / ".." / "shared" / "assets")).resolve()


@pytest.fixture(scope="session")
def assets() -> Path:
    if not ASSETS.is_dir():
        pytest.skip(f"no assets at {ASSETS}; set JAXTUNE_ASSETS")
    return ASSETS


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with a tiny random LLaMA and its tokenizer."""
    from tests.tiny import write_tiny

    return write_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def sums_file(tmp_path_factory) -> Path:
    """Forty examples to tune on: sums as prompt and completion."""
    from tests.tiny import write_jsonl

    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(5) for b in range(8)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "sums.jsonl", rows)
