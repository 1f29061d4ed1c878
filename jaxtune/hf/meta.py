"""Meta's model folders (https://github.com/meta-llama/llama-models): params.json and consolidated.00.pth, 01, ….

A model for n devices has n shards; a shard holds its device's slice of every matrix, and all of the norms.
"""

import json
import re
from pathlib import Path
from typing import Any

from jaxtune.errors import UserError
from jaxtune.hf import files, pickles

_AGAIN = "copy or download the file again"
_PARAMS = (
    "dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta use_scaled_rope "
    "rope_scaling_factor max_seq_len max_batch_size"
).split()


def read_params(file: Path) -> dict[str, Any]:
    """A params.json with possible sizes; `n_kv_heads` is set, and `vocab_size` too, -1 where it is the tokenizer's.

    Raises:
      UserError: the file is missing or damaged, or it describes what is no dense text LLaMA.
    """
    try:
        params = json.loads(file.read_text())
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}); it belongs beside consolidated.*.pth") from e
    except ValueError as e:
        raise UserError(f"{file}: not JSON ({e}); {_AGAIN}") from e
    if not isinstance(params, dict):
        raise UserError(f"{file}: holds no mapping; {_AGAIN}")
    params = {k: v for k, v in params.items() if v is not None}
    for key, value in params.items():
        if key not in _PARAMS:
            raise UserError(
                f"{file}: {key!r} is not supported: only dense text LLaMAs are read (no mixture of experts, no images, "
                f"no quantisation); allowed: {', '.join(_PARAMS)}"
            )
        if not isinstance(value, int | float):
            raise UserError(f"{file}: {key} should be a number, is {value!r:.50}; {_AGAIN}")
    params = {"n_kv_heads": params.get("n_heads", 0), "vocab_size": -1} | params
    sizes = {k: params.get(k, 0) for k in ("dim", "n_layers", "n_heads", "n_kv_heads")}
    sizes |= {
        k: params[k] for k in ("vocab_size", "max_seq_len") if k in params and (k, params[k]) != ("vocab_size", -1)
    }
    D, L, N, K, *_ = sizes.values()
    if any(type(n) is not int or n <= 0 for n in sizes.values()) or L > 2**16 or D % N or N % K or D // N % 2:
        given = ", ".join(f"{k} {v}" for k, v in sizes.items())
        raise UserError(f"{file}: impossible sizes: {given}; {_AGAIN}")
    return params


def read_shards(folder: Path) -> list[dict[str, files.Tensor]]:
    """The tensors of each shard, without the rotary frequencies; all have the same names.

    Raises:
      UserError: there are none, one is missing or damaged, or they hold different tensors.
    """
    found = {f: re.fullmatch(r"consolidated\.(\d+)\.pth", f.name) for f in folder.glob("consolidated.*.pth")}
    numbered = sorted((int(m[1]), f) for f, m in found.items() if m)
    if not numbered:
        raise UserError(f"{folder}: no consolidated.*.pth; give a folder of Meta's with params.json and the shards")
    for i, (n, f) in enumerate(numbered):
        if n != i:
            raise UserError(f"{folder}: shard {i} is missing, found {f.name}; copy or download all shards")
    shards = [{n: t for n, t in pickles.read(f).items() if not n.endswith("rope.freqs")} for _, f in numbered]
    for (_, f), shard in zip(numbered, shards, strict=True):
        if odd := sorted(set(shard) ^ set(shards[0])):
            which = "lacks" if odd[0] in shards[0] else "alone has"
            raise UserError(f"{f}: {which} {odd[0]!r}, unlike {numbered[0][1].name}; are they shards of one model?")
    return shards
