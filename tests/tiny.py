"""Tiny models and data, made on the spot: 2 layers, 32 wide, a byte-level tokenizer."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxtune import config
from jaxtune.layers import Rope
from jaxtune.models.decoder import DecoderConfig
from tests.processes import on_eight_devices as on_eight_devices
from tools.make_demo_model import write_jsonl as _write_jsonl
from tools.make_demo_model import write_random_model, write_tokenizer

SHAPE = DecoderConfig(
    vocab=300,
    embed=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head=8,
    mlp=48,
    tied=True,
    ropes=(Rope(8, context=128),),
    context=128,
)


def write_tiny(folder: Path, seed: int = 0, template: bool = False, **changes: Any) -> Path:
    """A model folder of `SHAPE`, changed as asked; without a chat template unless one is wanted."""
    write_random_model(folder, dataclasses.replace(SHAPE, **changes), seed)
    write_tokenizer(folder, ["1 + 2 = 3", "the fox eats berries"] * 50, 300)
    if not template:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "chat_template"}))
    return folder


def write_jsonl(file: Path, rows: list[dict]) -> Path:
    _write_jsonl(file, rows)
    return file


def make_config(model: Path, data: Path, output: Path, **dotted: Any) -> config.Config:
    """A config for a quick run; dots in keys are written as two underscores."""
    given = {k.replace("__", "."): v for k, v in dotted.items()}
    base = {
        "model": str(model),
        "output": str(output),
        "data.train": str(data),
        "data.max_length": 32,
        "train.compute_dtype": "float32",
        "train.remat": "none",
        "train.batch_size": 4,
        "train.steps": 6,
        "train.log_every": 1,
        "optim.learning_rate": 1e-2,
    }
    return config.load(None, config.nested({**base, **given}))
