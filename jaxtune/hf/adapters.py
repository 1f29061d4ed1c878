"""PEFT adapter folders, both ways: `adapter_config.json` and `adapter_model.safetensors`.

Layout of peft: `lora_A` is `(r, in)`, `lora_B` is `(out, r)`, under `base_model.model.<module>`.
"""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.errors import UserError
from jaxtune.hf import files, layout
from jaxtune.layers import Weight, is_weight, plain_names
from jaxtune.weights import LoRA, is_node, path_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_REFUSED = ("use_dora", "bias", "modules_to_save", "layers_to_transform", "lora_bias", "target_parameters")


def write(folder: Path, weights: Any, base: str, rank: int, alpha: float, dropout: float, rslora: bool) -> None:
    """Write the LoRA nodes of a tree of `Weight`s as an adapter that peft opens on `base`."""
    tensors: dict[str, files.Entry] = {}
    modules: list[str] = []
    for path, node in jax.tree_util.tree_leaves_with_path(weights, is_leaf=is_node):
        if not isinstance(node, LoRA):
            continue
        for i, name in enumerate(plain_names(path_name(path))):
            module = layout.hf_name(name).removesuffix(".weight")
            modules.append(module)
            a, b = (np.asarray(w.value[i] if w.stacked else w.value, np.float32) for w in (node.a, node.b))
            a_rI, b_Or = a.reshape(-1, rank).T, b.reshape(rank, -1).T
            for suffix, array in (("lora_A", a_rI), ("lora_B", b_Or)):
                key = f"{_PREFIX}{module}.{suffix}.weight"
                tensors[key] = files.Entry(array.shape, array.dtype, functools.partial(np.ascontiguousarray, array))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": False,
        "bias": "none",
        "target_modules": _targets(modules, weights),
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    files.write(folder / WEIGHTS, tensors)


def _targets(modules: list[str], weights: Any) -> list[str]:
    """Short names (`q_proj`) where they mean just these modules, else whole ones."""
    short = sorted({m.rsplit(".", 1)[-1] for m in modules})
    everything = [
        layout.hf_name(n).removesuffix(".weight")
        for p, w in jax.tree_util.tree_leaves_with_path(weights, is_leaf=lambda x: is_node(x) or is_weight(x))
        for n in plain_names(path_name(p))
    ]
    same = {m for m in everything if m.rsplit(".", 1)[-1] in short} == set(modules)
    return short if same else sorted(modules)


class Adapter:
    """A PEFT adapter folder, read: `wrap` puts its low-rank nodes where they belong."""

    def __init__(self, folder: Path) -> None:
        """Raises: UserError: a file is missing or damaged, or the adapter is of a kind that is not read."""
        try:
            self.config: Mapping[str, Any] = json.loads((folder / CONFIG).read_text())
        except FileNotFoundError as e:
            raise UserError(f"{folder}: has no {CONFIG}; is this a PEFT adapter folder?") from e
        except ValueError as e:
            raise UserError(f"{folder / CONFIG}: not JSON ({e}); copy or download it again") from e
        c = self.config
        if not isinstance(c, dict) or not {"r", "lora_alpha"} <= set(c):
            raise UserError(f"{folder / CONFIG}: 'r' and 'lora_alpha' were expected; is this a PEFT adapter folder?")
        if c.get("peft_type") != "LORA":
            raise UserError(f"{folder}: peft_type {c.get('peft_type')!r} is not read; allowed: LORA")
        for key in _REFUSED:
            if c.get(key) not in (None, False, "none", [], {}):
                raise UserError(f"{folder}: {key}={c[key]!r} is not supported in a LoRA adapter")
        self.folder = folder
        self._tensors = files.read_header(folder / WEIGHTS)
        self._found: dict[str, dict[str, files.Tensor]] = {}
        for name, t in self._tensors.items():
            m = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight", name)
            if m is None:
                raise UserError(f"{folder / WEIGHTS}: tensor {name!r} is not of a LoRA adapter on linear modules")
            self._found.setdefault(m[1], {})[m[2]] = t
        self._used: set[str] = set()

    @property
    def base(self) -> str:
        """The model that the adapter was trained on, as its config says."""
        return self.config.get("base_model_name_or_path") or ""

    def scale(self, module: str) -> float:
        c = self.config
        rank = _by_pattern(c.get("rank_pattern"), module, c["r"])
        alpha = _by_pattern(c.get("alpha_pattern"), module, c["lora_alpha"])
        return alpha / rank**0.5 if c.get("use_rslora") else alpha / rank

    def wrap(self, name: str, w: Weight, key: Any) -> Any:
        """The weight under its adapter, if it has one. `name` is the plain name of the first of its layers."""
        modules = [layout.hf_name(name).removesuffix(".weight")]
        if w.stacked:
            first = int(name.split("/")[1])
            tail = name.split("/", 2)[2]
            modules = [
                layout.hf_name(f"layers/{first + i}/{tail}").removesuffix(".weight") for i in range(w.value.shape[0])
            ]
        if not name.endswith("/weight") or modules[0] not in self._found or w.names[int(w.stacked)] == "vocab":
            return w
        self._used.update(modules)
        body, n = w.value.shape[int(w.stacked) :], w.n_in
        a, b = [], []
        for m in modules:
            try:
                a_rI, b_Or = self._found[m]["A"].open(), self._found[m]["B"].open()
                a.append(np.asarray(a_rI.T, np.float32).reshape(*body[:n], a_rI.shape[0]))
                b.append(np.asarray(b_Or.T, np.float32).reshape(b_Or.shape[1], *body[n:]))
            except (KeyError, ValueError) as e:
                shape = layout.hf_shape(w)
                raise UserError(f"{self.folder}: the adapter of {m} does not fit its weight {list(shape)}") from e
        s = int(w.stacked)
        names = w.names
        return LoRA(
            w,
            Weight(np.stack(a) if s else a[0], (*names[: s + n], "rank"), n_in=n),
            Weight(np.stack(b) if s else b[0], (*names[:s], "rank", *names[s + n :]), n_in=1),
            scale=self.scale(modules[0]),
        )

    def check_all_used(self) -> None:
        """Raises: UserError: the adapter names modules that the model does not have."""
        if unused := sorted(set(self._found) - self._used):
            raise UserError(f"{self.folder}: adapts modules that the model lacks: {', '.join(unused[:8])}")


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: float) -> float:
    """peft's rule: a pattern names a module's end."""
    for pattern, value in (patterns or {}).items():
        if re.search(rf"(^|.*\.){pattern}$", module):
            return value
    return otherwise
