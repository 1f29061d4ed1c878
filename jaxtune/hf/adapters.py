"""PEFT adapter folders, both ways: `adapter_config.json` and `adapter_model.safetensors`.

peft's layout, under `base_model.model.<module>`: `lora_A` is `(r, in)`, `lora_B` is `(out, r)`; of an embedding
`lora_embedding_A` is `(r, vocab)`, `lora_embedding_B` `(embed, r)`. Experts are parameters rather than modules
(`target_parameters`): A is `(experts · r, in)` and B `(out, r · experts)`, and of two parameters of one module the
first lies under `base_layer`. What trained whole (`modules_to_save`) is there under its own name, and the bias of such
a module too, for peft saves and wants the whole module. DoRA, AdaLoRA, IA³, VeRA, LoHa and LoKr: see `adapter_kinds`.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.errors import UserError
from jaxtune.hf import adapter_kinds as kinds
from jaxtune.hf import files, layout
from jaxtune.layers import Weight, plain_names
from jaxtune.models import heads
from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.heads import TaskHead
from jaxtune.nodes.dora import DoRA

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TASKS = {
    "classification": "SEQ_CLS", "regression": "SEQ_CLS", "token_classification": "TOKEN_CLS",
    "span_qa": "QUESTION_ANS",
}  # fmt: skip
_EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")  # of transformers' expert modules, in their order
_REFUSED = (
    "bias", "lora_bias", "fan_in_fan_out", "layer_replication", "trainable_token_indices", "use_qalora",
    "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations


def _module(plain: str) -> str:
    """The module that peft knows a weight by: transformers' own name, which families do not rename."""
    return layout.hf_name(plain, "llama").removesuffix(".weight")


def _is_expert(w: Weight) -> bool:
    return "expert" in layout.apart(w)


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def write(
    folder: Path,
    adapted: Mapping[str, tuple[Weight, Any]],
    names: Sequence[str],
    base: str,
    family: str,
    whole: Mapping[str, files.Entry],
    dropout: float = 0.0,
    rslora: bool = False,
    task: TaskHead | None = None,
) -> None:
    """Write nodes of one kind, by path and with the weights that they stand upon, as an adapter of `base` for peft.

    `names` are the plain names of all weights, `whole` the Hugging Face tensors of what trained without an adapter, and
    of the biases beside.
    Ranks and alphas come from the nodes.
    """
    tensors: dict[str, files.Entry] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    experts: list[str] = []

    def add(key: str, array: np.ndarray) -> None:
        tensors[key] = files.Entry(array.shape, array.dtype, functools.partial(np.ascontiguousarray, array))

    every = {p for path in adapted for p in plain_names(path)}
    nodes = {path: kinds.plain(node) for path, (_, node) in adapted.items()}
    first = next(iter(nodes.values()))
    kind = kinds.peft_type(first)
    root = rslora and kind == "LORA"
    inputs: list[str] = []
    for path, (w, _) in adapted.items():
        node, rank = nodes[path], kinds.rank(nodes[path])
        for i, plain in enumerate(plain_names(path)):
            module = _module(plain)
            ranks[module] = rank
            alphas[module] = round(getattr(node, "scale", 0.0) * (rank**0.5 if root else rank), 9)
            if getattr(node, "inputs", False):
                inputs.append(module)
            if _is_expert(w):
                experts.append(module)
            elif w.names[w.lead] == "vocab":
                a, b = (np.asarray(x.value, np.float32) for x in (node.a, node.b))
                add(f"{_PREFIX}{module}.lora_embedding_A", a.T)
                add(f"{_PREFIX}{module}.lora_embedding_B", b.T)
            else:
                for name, array in kinds.tensors(node, i).items():
                    add(f"{_PREFIX}{module}.{name}", array)
            if _is_expert(w):
                a_EIr, b_ErO = (np.asarray(x.value[i] if x.stacked else x.value, np.float32) for x in (node.a, node.b))
                b_ErO = b_ErO.reshape(*b_ErO.shape[:2], -1)
                inner = plain.replace(*_EXPERT_PARAMETERS) != plain and plain.replace(*_EXPERT_PARAMETERS) in every
                key = f"{_PREFIX}{module.rsplit('.', 1)[0]}{'.base_layer' if inner else ''}"
                add(f"{key}.lora_A.weight", a_EIr.transpose(0, 2, 1).reshape(-1, a_EIr.shape[1]))
                add(f"{key}.lora_B.weight", b_ErO.transpose(2, 1, 0).reshape(b_ErO.shape[2], -1))
    known_as = {layout.hf_name(p, family): layout.hf_name(p, "llama") for p in names}
    for name, entry in whole.items():
        tensors[f"{_PREFIX}{known_as[name]}"] = entry
    if kind == "VERA":
        for name, array in kinds.shared(list(nodes.values())).items():
            add(name, array)
    linear = [m for m in ranks if m not in experts]
    usual = experts or linear  # peft warns of patterns that match parameters
    rank, alpha = (_most_common({m: of[m] for m in usual}) for of in (ranks, alphas))
    patterns = {
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
    }
    targets, scaled_inputs = _targets(linear, names), _targets(inputs, names)
    if not set(scaled_inputs) <= set(targets):  # peft wants a part of the targets
        targets, scaled_inputs = sorted(linear), sorted(inputs)
    own: Mapping[str, Mapping[str, Any]] = {
        "LORA": {
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.0 if experts else dropout,  # peft knows no dropout on parameters
            "use_rslora": rslora,
            "use_dora": isinstance(first, DoRA),
            "bias": "none",
            "target_parameters": sorted({re.sub(r"^model\.layers\.\d+\.", "", m) for m in experts}) or None,
            "fan_in_fan_out": False,
            **patterns,
        },
        "IA3": {"feedforward_modules": scaled_inputs, "fan_in_fan_out": False},
        "VERA": {"r": rank, "vera_dropout": dropout, "save_projection": True, "bias": "none", "fan_in_fan_out": False},
        "LOHA": {"r": rank, "alpha": alpha, **patterns},
        "LOKR": {"r": rank, "alpha": alpha, **patterns},
    }
    config: dict[str, Any] = {
        "peft_type": kind,
        "task_type": "CAUSAL_LM" if task is None else _TASKS[task.kind],
        "base_model_name_or_path": base,
        "revision": None,
        "target_modules": targets,
        "modules_to_save": list(dict.fromkeys(known_as[n].rsplit(".", 1)[0] for n in whole)) or None,
        "inference_mode": True,
        **own[kind],
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    bare = {n.removeprefix(_PREFIX): t for n, t in tensors.items() if n.startswith(_PREFIX)}
    shared = {n: t for n, t in tensors.items() if not n.startswith(_PREFIX)}
    files.write(folder / WEIGHTS, shared | {_PREFIX + n: t for n, t in heads.renamed(bare, task, family).items()})


def _targets(modules: list[str], names: Sequence[str]) -> list[str]:
    """Short names (`q_proj`) where they mean just these modules, else whole ones."""
    short = sorted({m.rsplit(".", 1)[-1] for m in modules})
    everything = [_module(n) for n in names if n.endswith("/weight")]
    same = {m for m in everything if m.rsplit(".", 1)[-1] in short} == set(modules)
    return short if same else sorted(modules)


class Adapter:
    """A PEFT adapter folder, read: `wrap` puts its nodes where they belong."""

    virtual = 0  # virtual tokens, see `soft_prompts`

    def __init__(self, folder: Path) -> None:
        """Raises: UserError: a file is missing or damaged, or the adapter is of a kind that is not read."""
        try:
            self.config: Mapping[str, Any] = json.loads((folder / CONFIG).read_text())
        except FileNotFoundError as e:
            raise UserError(f"{folder}: has no {CONFIG}; is this a PEFT adapter folder?") from e
        except ValueError as e:
            raise UserError(f"{folder / CONFIG}: not JSON ({e}); copy or download it again") from e
        c = self.config
        if not isinstance(c, dict) or "peft_type" not in c:
            raise UserError(f"{folder / CONFIG}: 'peft_type' was expected; is this a PEFT adapter folder?")
        self.kind: str = c["peft_type"]
        if self.kind not in kinds.TENSORS:
            raise UserError(f"{folder}: peft_type {self.kind!r} is not read; allowed: {', '.join(kinds.TENSORS)}")
        if missing := [k for k in kinds.NEEDED[self.kind] if k not in c]:
            raise UserError(f"{folder / CONFIG}: {missing[0]!r} was expected; is this a PEFT adapter folder?")
        for key in _REFUSED:
            if c.get(key) not in (None, False, "none", [], {}):
                raise UserError(f"{folder}: {key}={c[key]!r} is not supported in an adapter of type {self.kind}")
        if str(c.get("init_lora_weights")).split("_niter")[0] in _CHANGES_BASE:
            raise UserError(
                f"{folder}: init_lora_weights={c['init_lora_weights']!r} changes the base model too, which is not "
                "followed; convert the adapter to plain LoRA where it was made"
            )
        self.folder = folder
        self._factors: dict[str, dict[str, files.Tensor]] = {}
        self._whole: dict[str, files.Tensor] = {}  # by transformers' own names
        self._shared: dict[str, files.Tensor] = {}
        names = kinds.TENSORS[self.kind]
        for name, t in files.read_header(folder / WEIGHTS).items():
            name = name.replace(f"{_PREFIX}transformer.", f"{_PREFIX}model.", 1)  # under a span head of LLaMA
            if self.kind == "VERA" and name in kinds.SHARED.values():
                self._shared[name] = t
                continue
            kind = re.fullmatch(rf"{re.escape(_PREFIX)}(.+?)\.(?:({'|'.join(names)})(?:\.weight)?|(weight|bias))", name)
            if kind is None:
                raise UserError(f"{folder / WEIGHTS}: tensor {name!r} is not of an adapter of type {self.kind}")
            if kind[2] is None:
                self._whole[f"{kind[1].removesuffix('.base_layer')}.{kind[3]}"] = t
            else:
                self._factors.setdefault(self._parameter(kind[1]), {})[names[kind[2]]] = t
        if self.kind == "VERA" and len(self._shared) < 2:
            raise UserError(
                f"{folder}: was saved without VeRA's random matrices, which torch would draw again; save it with "
                "save_projection=True where it was made"
            )
        self._used: set[str] = set()

    def _parameter(self, module: str) -> str:
        """The module of a factor; of experts' the parameter."""
        targets = {p.rsplit(".", 1)[-1] for p in self.config.get("target_parameters") or ()}
        names = [p for p in _EXPERT_PARAMETERS if p in targets]
        if not names or not re.search(r"\.experts(\.base_layer)?$", module):
            return module
        inner = module.endswith(".base_layer")
        return f"{module.removesuffix('.base_layer')}.{names[0] if inner else names[-1]}"

    @property
    def base(self) -> str:
        """The model that the adapter was trained on, as its config says."""
        return self.config.get("base_model_name_or_path") or ""

    @property
    def rslora(self) -> bool:
        return bool(self.config.get("use_rslora"))

    def trained_whole(self, plain: str) -> bool:
        """Whether the adapter brings this weight whole."""
        return plain.endswith("/weight") and layout.hf_name(plain, "llama") in self._whole

    def adapts(self, plain: str) -> bool:
        """Whether the adapter adds to this weight."""
        return plain.endswith("/weight") and _module(plain) in self._factors

    def replace(self, tensors: Mapping[str, Any], family: str, tied: bool) -> dict[str, Any]:
        """A base model's tensors with those in their places that the adapter brings whole.

        Raises:
          UserError: the base has no such tensor.
        """
        out = dict(tensors)
        for theirs, t in self._whole.items():
            name = layout.hf_name(theirs.removeprefix("model.").replace(".", "/"), family)
            if name not in out and name not in (layout.EMBED, layout.HEAD) and not name.startswith(layout.OUTSIDE):
                raise UserError(f"{self.folder}: brings {theirs}, which the model lacks")
            if tied and name == layout.EMBED and layout.HEAD not in self._whole:  # the base may hold it as the head
                out.pop(layout.HEAD, None)
            out[name] = t
        return out

    def rows(self) -> int | None:
        """How many tokens the embedding table that it brings has, if it brings one."""
        t = self._whole.get(layout.hf_name("embed_tokens/weight", "llama"))
        return None if t is None else t.shape[0]

    def _scale(self, module: str) -> float:
        c = self.config
        if self.kind in ("IA3", "VERA"):
            return 1.0
        if self.kind == "ADALORA":  # by the rank at first, whatever is left of it
            return (c["lora_alpha"] if c["lora_alpha"] > 0 else c["init_r"]) / (c["init_r"] + 1e-5)
        rank = _by_pattern(c.get("rank_pattern"), module, c["r"])
        alpha = _by_pattern(c.get("alpha_pattern"), module, c["lora_alpha" if self.kind == "LORA" else "alpha"])
        return alpha / rank**0.5 if self.rslora else alpha / rank

    def wrap(self, name: str, w: Weight, key: Any) -> Any:
        """The weight under its adapter, if it has one. `name` is the plain name of the first of its layers."""
        names = [name]
        if w.stacked:
            _, first, tail = name.split("/", 2)
            names = [f"layers/{int(first) + i}/{tail}" for i in range(w.value.shape[0])]
        modules = [_module(n) for n in names]
        if modules[0].removesuffix(".bias") not in self._factors:
            return w
        if name.endswith("/bias"):
            if self.kind == "IA3" and self._factors[modules[0].removesuffix(".bias")]["l"].shape[0] != 1:
                raise UserError(f"{self.folder}: scales {modules[0]} too, which is not supported; merge it with peft")
            return w
        self._used.update(modules)
        found = [self._factors[m] for m in modules if m in self._factors]
        if self.kind == "ADALORA" and all(0 in t["a"].shape for t in found):
            return w  # nothing is left
        if "magnitude" in found[0] and ("vocab" in w.names[: w.lead + w.n_in] or _is_expert(w)):
            raise UserError(f"{self.folder}: DoRA of {modules[0]} is not supported, only of linear layers")
        with_shared = {field: self._shared[name] for field, name in kinds.SHARED.items() if self._shared}
        layers = [
            {field: np.asarray(t.open(), np.float32) for field, t in {**tensors, **with_shared}.items()}
            for tensors in found
        ]
        try:
            if len(found) < len(modules):
                raise KeyError("layers")
            return kinds.read(self.kind, w, layers, self._scale(modules[0]))
        except (KeyError, ValueError) as e:
            shape = layout.hf_shape(w)
            raise UserError(f"{self.folder}: the adapter of {modules[0]} does not fit its weight {list(shape)}") from e

    def on(self, decoder: DecoderConfig) -> Callable[[str, Weight, Any], Any]:
        """How it wraps a decoder's weights."""
        return self.wrap

    def check_all_used(self) -> None:
        """Raises: UserError: the adapter names modules that the model does not have."""
        if unused := sorted(set(self._factors) - self._used):
            raise UserError(f"{self.folder}: adapts modules that the model lacks: {', '.join(unused[:8])}")


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: float) -> float:
    """peft's rule: a pattern names a module's end."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise
