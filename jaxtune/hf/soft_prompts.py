"""PEFT folders of soft prompts, both ways: one tensor `prompt_embeddings` beside `adapter_config.json`.

Of PROMPT_TUNING, and of P_TUNING as it is saved, the tensor is `[V, D]`: what stands before the text's embeddings. Of
PREFIX_TUNING it is `[V, L · 2 · K · H]`: the past keys and values. P-tuning is written as PROMPT_TUNING, which is the
same at inference.

Dimensions: V virtual tokens, D embed, L layers, K key/value heads, H head dim.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.errors import UserError
from jaxtune.hf import files
from jaxtune.hf.adapters import CONFIG, WEIGHTS, Adapter
from jaxtune.layers import Weight, unbox
from jaxtune.models.decoder import DecoderConfig
from jaxtune.nodes.soft_prompt import PREFIX_AXES, PROMPT_AXES, TABLE, Prefix, SoftPrompt
from jaxtune.weights import densify

KINDS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
_TENSOR = "prompt_embeddings"


def open_adapter(folder: Path) -> "Adapter | SoftPrompts":
    """A PEFT folder of any kind that is read.

    Raises:
      UserError: it is none, or damaged.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return Adapter(folder)  # which says what is wrong
    prompt = isinstance(config, dict) and config.get("peft_type") in KINDS
    return SoftPrompts(folder, config) if prompt else Adapter(folder)


def write(folder: Path, node: SoftPrompt | Prefix, base: str, decoder: DecoderConfig) -> None:
    """Write a soft prompt of `Weight`s as a folder that peft opens on `base`."""
    node = unbox(node)
    if isinstance(node, SoftPrompt):
        kind, values = "PROMPT_TUNING", np.asarray(densify(jax.tree.map(np.asarray, node.prompt)), np.float32)
        values = values * _scale(decoder)
        dim, heads = decoder.embed, decoder.heads
        own: dict[str, Any] = {"prompt_tuning_init": "RANDOM"}
    else:
        kind, both_2LKVH = "PREFIX_TUNING", np.stack([np.asarray(node.k_LKVH), np.asarray(node.v_LKVH)])
        values = both_2LKVH.transpose(3, 1, 0, 2, 4).reshape(node.tokens, -1).astype(np.float32)
        dim, heads = decoder.kv_heads * decoder.head, decoder.kv_heads
        own = {"prefix_projection": False, "encoder_hidden_size": dim}
    config = {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "num_virtual_tokens": values.shape[0],
        "token_dim": dim,
        "num_attention_heads": heads,
        "num_layers": decoder.layers,
        "num_transformer_submodules": 1,
        "inference_mode": True,
        **own,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    files.write(folder / WEIGHTS, {_TENSOR: files.Entry(values.shape, values.dtype, lambda: values)})


def _scale(decoder: DecoderConfig) -> float:
    """What peft's virtual tokens are ours times: transformers' Gemma scales in its table, which they go around."""
    return decoder.embed_scale if decoder.family.startswith("gemma") else 1.0


class SoftPrompts:
    """A PEFT folder of a soft prompt, read; it is used as an `Adapter` is."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Raises: UserError: a file is missing or damaged, or holds something else."""
        tensors = files.read_header(folder / WEIGHTS)
        if set(tensors) != {_TENSOR}:
            raise UserError(
                f"{folder / WEIGHTS}: {_TENSOR!r} alone was expected of {config['peft_type']}, there is "
                f"{', '.join(sorted(tensors)[:4]) or 'nothing'}; save the prompt, and nothing else, from peft"
            )
        self.folder, self.config = folder, config
        self._values = np.asarray(tensors[_TENSOR].open(), np.float32)

    @property
    def base(self) -> str:
        """The model that the prompt was trained on, as its config says."""
        return self.config.get("base_model_name_or_path") or ""

    @property
    def _is_prefix(self) -> bool:
        return self.config["peft_type"] == "PREFIX_TUNING"

    @property
    def virtual(self) -> int:
        """Virtual tokens that stand as ids before every text."""
        return 0 if self._is_prefix else self._values.shape[0]

    def on(self, decoder: DecoderConfig) -> Callable[[str, Weight, Any], Any]:
        """The wrapping that puts the prompt on this decoder's token table.

        Raises:
          UserError: it was made for a model of another shape.
        """
        L, K, H = decoder.layers, decoder.kv_heads, decoder.head
        width = 2 * L * K * H if self._is_prefix else decoder.embed
        if self._values.ndim != 2 or self._values.shape[1] != width:
            raise UserError(
                f"{self.folder}: holds {list(self._values.shape)}, the model takes {width} numbers for each virtual "
                f"token; take the model that it was trained on{f', {self.base}' if self.base else ''}"
            )

        def wrap(name: str, w: Weight, key: Any) -> Any:
            if name != TABLE:
                return w
            if not self._is_prefix:
                return SoftPrompt(w, Weight(self._values / _scale(decoder), PROMPT_AXES, n_in=1))
            k_LKVH, v_LKVH = self._values.reshape(-1, L, 2, K, H).transpose(2, 1, 3, 0, 4)
            return Prefix(w, Weight(k_LKVH, PREFIX_AXES, n_in=1), Weight(v_LKVH, PREFIX_AXES, n_in=1))

        return wrap

    def replace(self, tensors: Mapping[str, Any], family: str, tied: bool) -> dict[str, Any]:
        """A base model's tensors: a prompt brings none."""
        return dict(tensors)

    def rows(self) -> None:
        """It brings no table."""

    def check_all_used(self) -> None:
        """The prompt is one tensor, which `on` has checked."""
