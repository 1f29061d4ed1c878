"""The configuration: one YAML file and `key=value` overrides, read into frozen objects that refuse unknown keys.

YAML holds numbers and names only. Every key is documented here, with its default; `jaxtune config-schema` prints the
same as a JSON schema. Relative paths in a file start at that file, in an override at the working directory.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from jaxtune.errors import UserError, nearest

DEMO = "demo"  # names the model and the data that come with the package


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Source(_Strict):
    """One data file."""

    path: str
    """A JSONL or CSV file."""
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "text"] = "auto"
    """Which columns a row has; "auto" looks at the first row."""
    columns: dict[str, str] = {}
    """Names of the columns in the file, where they differ: {prompt: question, completion: answer}."""
    max_samples: int | None = Field(None, gt=0)
    """Take only the first n rows."""


class Data(_Strict):
    """What is trained on, and how text becomes tokens."""

    train: str | list[Source] = DEMO
    """A JSONL or CSV file, "demo", or a list of sources."""
    validation: Annotated[float, Field(ge=0)] | str = 0.0
    """Held out: a fraction (below 1), a number of examples, or a file of its own."""
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "text"] = "auto"
    """Format of the sources that name none."""
    columns: dict[str, str] = {}
    """Columns of the sources that name none."""
    max_length: int = Field(1024, ge=8)
    """Tokens in a row; longer examples are cut at the end, longer texts into pieces."""
    packing: bool = True
    """Several examples in a row; they never see each other."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Loss on every assistant turn, on the last one only, or on the prompt too."""
    template: str = "auto"
    """Chat template: "auto" takes the tokenizer's own, else one that suits the data; or a name, or a Jinja file."""

    @property
    def sources(self) -> list[Source]:
        given = [Source(path=self.train)] if isinstance(self.train, str) else self.train
        return [self._filled(s) for s in given]

    @property
    def validation_sources(self) -> list[Source]:
        return [self._filled(Source(path=self.validation))] if isinstance(self.validation, str) else []

    def _filled(self, s: Source) -> Source:
        update: dict[str, Any] = {}
        if s.format == "auto":
            update["format"] = self.format
        if not s.columns:
            update["columns"] = self.columns
        return s.model_copy(update=update)


class Full(_Strict):
    """Every weight trains."""

    method: Literal["full"]


class Freeze(_Strict):
    """Some layers and modules train, the rest is frozen."""

    method: Literal["freeze"]
    last: int = Field(0, ge=0)
    """Train the last n layers."""
    train: list[str] = []
    """Also train what these patterns match: "head", "embeddings", or regexes on names like layers/3/mlp/up_proj."""

    @model_validator(mode="after")
    def _something_trains(self) -> "Freeze":
        if not self.last and not self.train:
            raise ValueError("nothing would train; set tuning.last or tuning.train")
        return self


class Lora(_Strict):
    """Low-rank adapters (Hu et al., 2021) beside frozen weights."""

    method: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1)
    """Rank r of the adapters."""
    alpha: float = Field(16.0, gt=0)
    """The adapters' product is scaled by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the adapters' inputs that is dropped in training."""
    targets: str | list[str] = "all-linear"
    """"all-linear" (every matrix of the layers, experts among them), or regexes on names like
    layers/3/self_attn/q_proj."""
    train: list[str] = []
    """Patterns on parameter names that train whole beside the adapters; "head" and "embeddings" are known by name."""
    adapter: str | None = None
    """A PEFT adapter to go on from; its ranks, alphas, targets and whole modules hold instead of the keys here."""
    rslora: bool = False
    """Scale by alpha / √r instead (Kalajdzievski, 2023)."""

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


Tuning = Annotated[Full | Freeze | Lora, Field(discriminator="method")]


class Optim(_Strict):
    """The optimiser and its learning rate over time."""

    name: Literal["adamw", "adafactor", "lion", "sgd"] = "adamw"
    """Which optimiser."""
    learning_rate: float = Field(1e-4, gt=0)
    """The highest learning rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How it falls after warm-up; "wsd" stays constant, then falls linearly over the last part (`decay`)."""
    warmup: float = Field(0.03, ge=0)
    """Linear warm-up: a share of all steps (below 1) or a number of steps."""
    decay: float = Field(0.2, gt=0)
    """Length of the fall of "wsd": a share of all steps (below 1) or a number of steps."""
    final: float = Field(0.0, ge=0, le=1)
    """Where the fall ends, as a share of the learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, of matrices only: not of norms and biases."""
    clip: float = Field(1.0, ge=0)
    """Largest global norm of the gradient; 0 does not clip."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """First-moment decay of AdamW and Lion, momentum of SGD."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Second-moment decay of AdamW, second decay of Lion."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""


class Train(_Strict):
    """The loop."""

    epochs: float = Field(1.0, gt=0)
    """Passes over the data, where `steps` is not given."""
    steps: int | None = Field(None, gt=0)
    """Optimiser steps, instead of epochs."""
    batch_size: int = Field(32, ge=1)
    """Sequences (packed rows) per optimiser step, over all devices."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches that a step is made of; the result does not depend on it."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Activations and frozen weights; trained weights and the optimiser are float32."""
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass computes again: nothing, all but matrix products, or each layer whole."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of adapters, dropout, the shuffle and the split."""
    log_every: int = Field(10, ge=1)
    """Steps between lines of the log."""
    router_loss: float | None = Field(None, ge=0)
    """Weight of the load-balancing loss of a mixture of experts; where not given, the model's own
    router_aux_loss_coef if its config sets output_router_logits, else 0."""


class Vocabulary(_Strict):
    """Tokens beyond those that the model has."""

    add: list[str] = []
    """Tokens to add to the tokenizer. Their embeddings start as the mean of the others."""
    special: list[str] = []
    """The same as special tokens, which decoding may skip."""
    grow: bool = False
    """Grow the embedding table where the tokenizer is larger than it."""
    multiple: int = Field(1, ge=1)
    """Pad the table to a multiple of this, so that it divides over devices. Padding is never likely nor exported."""


class Evaluate(_Strict):
    """Measuring on the validation set while training."""

    every: int = Field(100, ge=1)
    """Steps between evaluations; there is one before the first step and one after the last."""
    batch_size: int | None = Field(None, ge=1)
    """Sequences per evaluation step; train.batch_size / train.accumulation where not given."""


class Checkpoint(_Strict):
    """Saving and starting again."""

    every: int = Field(200, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = Field(3, ge=1)
    """How many checkpoints stay."""
    resume: Literal["auto", "never"] = "auto"
    """"auto" goes on from the newest checkpoint of the output folder; "never" wants a new folder."""


class Mesh(_Strict):
    """How many devices split what; one axis may be -1 and takes all that are left."""

    data: int = 1
    """Split the batch; weights are copied."""
    fsdp: int = -1
    """Split the batch and the weights."""
    expert: int = 1
    """Split the batch, and the experts of a mixture."""
    tensor: int = 1
    """Split heads, MLP and vocabulary."""

    @model_validator(mode="after")
    def _sizes(self) -> "Mesh":
        sizes = self.data, self.fsdp, self.expert, self.tensor
        if any(n == 0 or n < -1 for n in sizes):
            raise ValueError("each axis is a positive number of devices, or -1 for all that are left")
        if sizes.count(-1) > 1:
            raise ValueError("only one axis can be -1; set the others, such as mesh.fsdp=1")
        return self


class Config(_Strict):
    """A whole run."""

    model: str = DEMO
    """A model folder in Hugging Face format or a cache of one, here or at gs://…, a hub id, or "demo"."""
    output: str = "runs/run"
    """The run folder."""
    data: Data = Data()
    vocabulary: Vocabulary = Vocabulary()
    objective: Literal["sft", "pretrain"] = "sft"
    """Next-token loss on the answers ("sft") or on all text ("pretrain")."""
    tuning: Tuning = Lora()
    optim: Optim = Optim()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    mesh: Mesh = Mesh()

    @model_validator(mode="before")
    @classmethod
    def _lora_unless_said(cls, tree: Any) -> Any:
        """`tuning.rank=16` alone means LoRA, as leaving the section out does."""
        if isinstance(tree, Mapping) and isinstance(t := tree.get("tuning"), Mapping) and "method" not in t:
            return {**tree, "tuning": {"method": "lora", **t}}
        return tree

    @model_validator(mode="after")
    def _accumulation_divides(self) -> "Config":
        if self.train.batch_size % self.train.accumulation:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} is not a multiple of "
                f"train.accumulation {self.train.accumulation}"
            )
        return self


# --- reading --------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML with 1e-4 as a number and duplicate keys as errors."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict:
    seen = set()
    for key, _ in node.value:
        if key.value in seen:
            raise UserError(f"line {key.start_mark.line + 1}: key {key.value!r} stands twice; keep one")
        seen.add(key.value)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file as nested dicts, its paths made to start at the file's folder.

    Raises:
      UserError: the file is missing or is not a YAML mapping.
    """
    try:
        tree = _parse(file.read_text())
    except FileNotFoundError as e:
        raise UserError(f"{file}: no such config; `jaxtune recipes ls` lists those that come along") from e
    except IsADirectoryError as e:
        raise UserError(f"{file}: is a folder, not a YAML file") from e
    except UserError as e:
        raise UserError(f"{file}: {e}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{file}: not YAML: {' '.join(str(e).split())}") from e
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{file}: a mapping of keys was expected, this is a {type(tree).__name__}")
    return _with_paths_from(tree, file.parent)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested dicts; paths start at the working directory.

    >>> nested({"train.steps": 20, "optim": {"name": "lion"}})
    {'train': {'steps': 20}, 'optim': {'name': 'lion'}}
    """
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        level = tree
        for parent in parents:
            level = level.setdefault(parent, {})
            if not isinstance(level, dict):
                raise UserError(f"{key}: {parent} has a value of its own already")
        level[last] = str(value) if isinstance(value, Path) else value
    return _with_paths_from(tree, Path())


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["train.steps=20", "optim.learning_rate=1e-4"]` as nested dicts.

    >>> parse_overrides(["train.steps=20", "optim.learning_rate=1e-4"])
    {'train': {'steps': 20}, 'optim': {'learning_rate': 0.0001}}
    """
    values = {}
    for pair in pairs:
        key, eq, value = pair.partition("=")
        if not eq or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise UserError(f"{pair!r}: key=value was expected, such as train.steps=20")
        try:
            values[key] = _parse(value)
        except yaml.YAMLError as e:
            raise UserError(f"{pair!r}: the value is not YAML: {' '.join(str(e).split())}") from e
    return nested(values)


def load(file: Path | None, *layers: Mapping[str, Any]) -> Config:
    """The config of a file under layers of overrides, later ones first.

    Raises:
      UserError: an unknown key, or a value that does not fit, in one line.
    """
    tree = read_yaml(file) if file else {}
    for layer in layers:
        tree = _merge(tree, layer)
    return validate(tree, str(file) if file else "config")


def validate(tree: Mapping[str, Any], place: str) -> Config:
    """A config from nested dicts; one error that lists every fault."""
    try:
        return Config.model_validate(tree)
    except ValidationError as e:
        inner = [".".join(map(str, err["loc"])) for err in e.errors() if "list[Source]" in err["loc"]]
        faults = [err for err in e.errors() if not (inner and err["type"] == "string_type")]
        raise UserError(f"{place}: {'; '.join(_fault(err) for err in faults)}") from e


def dump(config: Config) -> str:
    """A config as YAML, every key with its value; paths are absolute, so it reads the same from anywhere."""
    return yaml.safe_dump(_with_paths_from(config.model_dump(), Path.cwd()), sort_keys=False)


def _merge(old: Any, new: Any) -> Any:
    """`new` over `old`. Another tuning method starts afresh: the keys of the old one mean nothing to it."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    if "method" in new and new["method"] != old.get("method", "lora"):
        return dict(new)
    return {**old, **{k: _merge(old.get(k), v) for k, v in new.items()}}


def _with_paths_from(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Relative paths joined to `folder`. A model that is no folder there may be a hub id and stays as it is."""

    def joined(value: Any, must: bool = True) -> Any:
        if not isinstance(value, str) or value in (DEMO, "") or "://" in value or Path(value).is_absolute():
            return value
        path = Path(os.path.normpath(folder / Path(value).expanduser()))
        return str(path) if must or path.exists() or value.startswith((".", "~")) or value.count("/") != 1 else value

    tree = dict(tree)
    if isinstance(data := tree.get("data"), dict):
        data = tree["data"] = dict(data)
        for key in ("train", "validation"):
            if isinstance(value := data.get(key), list):
                data[key] = [{**s, "path": joined(s.get("path"))} if isinstance(s, dict) else s for s in value]
            elif key in data:
                data[key] = joined(value)
        if str(data.get("template", "")).endswith((".jinja", ".jinja2", ".j2")):
            data["template"] = joined(data["template"])
    if "model" in tree:
        tree["model"] = joined(tree["model"], must=False)
    if "output" in tree:
        tree["output"] = joined(tree["output"])
    if isinstance(tuning := tree.get("tuning"), dict) and "adapter" in tuning:
        tree["tuning"] = {**tuning, "adapter": joined(tuning["adapter"])}
    return tree


def _fault(error: Mapping[str, Any]) -> str:
    """One fault in plain words, with the nearest valid key where one is unknown."""
    loc = [str(p) for p in error["loc"] if p not in ("full", "freeze", "lora", "float", "str", "list[Source]")]
    where = ".".join(loc) or "config"
    if error["type"] == "extra_forbidden":
        return f"unknown key {where}{nearest(loc[-1], _keys(loc[:-1], error))}"
    if error["type"] == "union_tag_invalid":
        return f"{where}.method: {error['ctx']['tag']!r} is unknown; allowed: full, freeze, lora"
    if error["type"] == "union_tag_not_found":
        return f"{where}.method: is missing; allowed: full, freeze, lora"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message[0].lower()}{message[1:]}, got {error['input']!r}" if loc else message


def _keys(loc: Sequence[str], error: Mapping[str, Any]) -> list[str]:
    """The keys that are allowed at a place."""
    methods: Mapping[str, type[BaseModel]] = {"full": Full, "freeze": Freeze, "lora": Lora}
    model: Any = Config
    for part in loc:
        if part == "tuning":
            model = next((methods[p] for p in error["loc"] if p in methods), Lora)
        elif part.isdigit() or (part == "train" and model is Data):
            model = Source
        else:
            model = model.model_fields[part].annotation
    return list(model.model_fields)
