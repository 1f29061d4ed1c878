"""Several PEFT adapters of one base, added up: W + Σ weight · scale · A B."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import log
from jaxtune.errors import UserError
from jaxtune.hf.adapters import Adapter
from jaxtune.hf.soft_prompts import SoftPrompts, open_adapter
from jaxtune.layers import Weight
from jaxtune.nodes.lora import LoRA


class Several(Adapter):
    """Plain LoRA adapters of one base, each with a weight, as one whose ranks are the sums of theirs.

    Tokenizer and chat template are those of the adapter that brings an embedding table, else of the first.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Raises: UserError: an adapter cannot be read or is no plain LoRA, or brings whole what another changes."""
        self.parts: list[tuple[Any, float]] = [(open_adapter(Path(f)), weight) for f, weight in weights.items()]
        self._whole = {}
        for a, weight in self.parts:
            if (kind := "DORA" if a.config.get("use_dora") else a.config.get("peft_type")) != "LORA":
                raise UserError(
                    f"{a.folder}: {kind} adapters are not added up, LORA ones are; merge it alone, with weight 1"
                )
            if a._whole and weight != 1:
                raise UserError(f"{a.folder}: brings {min(a._whole)} whole, which has no weight; give it weight 1")
            for other, _ in self.parts:
                if other is not a and (both := _modules(a._whole) & {*_modules(other._whole), *other._factors}):
                    raise UserError(
                        f"{a.folder}: brings {min(both)} whole, which {other.folder} changes too; merge one of them"
                    )
            self._whole |= a._whole
        brings_table = [a for a, _ in self.parts if a.rows() is not None]
        self.folder = (brings_table or [self.parts[0][0]])[0].folder
        self.config = self.parts[0][0].config
        if len(bases := sorted({a.base for a, _ in self.parts})) > 1:
            log.warn(f"the adapters name different bases: {', '.join(bases)}")

    def wrap(self, name: str, w: Weight, key: Any) -> Any:
        """The weight under the sum of its adapters, if it has one: one node, with weights and scales within its B."""
        nodes = [(node, weight) for a, weight in self.parts if (node := a.wrap(name, w, key)) is not w]
        if not nodes:
            return w
        a = np.concatenate([node.a.value for node, _ in nodes], -1)
        b = np.concatenate([node.b.value * (weight * node.scale) for node, weight in nodes], w.lead)
        first = nodes[0][0]
        return LoRA(w, first.a.like(a), first.b.like(b))

    def check_all_used(self) -> None:
        """Raises: UserError: an adapter names modules that the model does not have."""
        for a, _ in self.parts:
            a.check_all_used()


def _modules(tensors: Mapping[str, Any]) -> set[str]:
    return {name.rsplit(".", 1)[0] for name in tensors}


def read(adapter: str | Mapping[str, float]) -> Adapter | SoftPrompts:
    """An adapter folder, or folders and their weights, to be added up."""
    weights = {adapter: 1.0} if isinstance(adapter, str) else adapter
    if list(weights.values()) == [1.0]:
        return open_adapter(Path(*weights))
    return Several(weights)


def weighted(texts: Sequence[str]) -> dict[str, float]:
    """Folders and their weights, of `FOLDER` or `FOLDER=WEIGHT`.

    >>> weighted(["runs/a/export", "runs/b/export=0.3"])
    {'runs/a/export': 1.0, 'runs/b/export': 0.3}

    Raises:
      UserError: a weight is no number, or a folder is there twice.
    """
    out: dict[str, float] = {}
    for text in texts:
        folder, _, number = (text, "", "1") if Path(text).exists() or "=" not in text else text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise UserError(f"--adapter {text}: {number!r} is no weight; give a number, as in {folder}=0.5")
        if folder in out:
            raise UserError(f"--adapter {folder}: is given twice; give it once, with the sum of the weights")
        out[folder] = weight
    return out
