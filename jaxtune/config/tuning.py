"""The tuning methods and their keys: the `tuning` section of a config."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from jaxtune.config.base import Strict

Base = Literal["nf4", "int4", "int8", "fp8"]


class KeepZeros(Strict):
    """For models that were pruned."""

    keep_zeros: bool = False
    """What is zero in a matrix of the layers stays zero, in training and in the export, which is then a whole model:
    for tuning a model that `jaxtune prune` made. Adapters are masked with their base."""


class Full(KeepZeros):
    """Every weight trains."""

    method: Literal["full"]


class Freeze(KeepZeros):
    """Some layers and modules train, the rest is frozen."""

    method: Literal["freeze"]
    last: int = Field(0, ge=0)
    """Train the last n layers."""
    first: int = Field(0, ge=0)
    """Train the first n layers."""
    train: list[str] = []
    """Also train what these patterns match: "embeddings", "head", "norms", "biases" (BitFit), or regexes on names like
    layers/3/mlp/up_proj."""

    @model_validator(mode="after")
    def _something_trains(self) -> "Freeze":
        if not self.last and not self.first and not self.train:
            raise ValueError("nothing would train; set tuning.last, tuning.first or tuning.train")
        return self


class Adapter(Strict):
    """What all methods share that leave the model as it is and add to it; they export a PEFT adapter."""

    base: Base | None = None
    """Hold the frozen matrices of the layers in 4 bits (nf4 of QLoRA, int4) or 8 (int8, fp8) while training."""
    group: int = Field(64, ge=2)
    """Numbers that share a scale in a quantised base; fewer where the inputs of a matrix do not divide."""


class Lora(Adapter, KeepZeros):
    """Low-rank adapters (Hu et al., 2021) beside frozen weights, and their kin."""

    method: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1)
    """Rank r of the adapters."""
    alpha: float = Field(16.0, gt=0)
    """The adapters' product is scaled by alpha / r."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Ranks of weights that a regex matches: {"layers/[01]/": 4, o_proj: 16}; the first that matches holds."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """The same for alpha."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the adapters' inputs that is dropped in training."""
    targets: str | list[str] = "all-linear"
    """"all-linear" (every matrix of the layers, experts among them), or regexes on names like
    layers/3/self_attn/q_proj."""
    train: list[str] = []
    """Patterns on parameter names that train whole beside the adapters; "embeddings", "head" and "norms" are known by
    name."""
    adapter: str | None = None
    """A PEFT adapter to go on from; its ranks, alphas, targets and whole modules hold instead of the keys here."""
    form: Literal["lora", "vera", "loha", "lokr"] = "lora"
    """What is added: a product of two matrices; one with shared random matrices of which only scales train (VeRA,
    Kopiczko et al., 2023); the Hadamard product of two products (LoHa, Hyeon-Woo et al., 2021); a Kronecker product
    (LoKr)."""
    rslora: bool = False
    """Scale by alpha / √r instead (Kalajdzievski, 2023)."""
    dora: bool = False
    """Train direction and magnitude apart (DoRA, Liu et al., 2024)."""
    init: Literal["default", "gaussian", "pissa", "olora"] = "default"
    """How A and B start: uniform and zero; normal and zero; the weight's principal singular vectors, which the base
    then lacks (PiSSA, Meng et al., 2024); those of its QR decomposition (OLoRA, Büyükakyüz, 2024)."""
    lora_plus: float = Field(1.0, gt=0)
    """B's learning rate over A's (LoRA+, Hayou et al., 2024, which advises 16)."""

    @model_validator(mode="after")
    def _fits(self) -> "Lora":
        plain = self.form == "lora"
        for name, given in (("dora", self.dora), ("lora_plus", self.lora_plus != 1), ("init", self.init != "default")):
            if given and not plain:
                raise ValueError(f"tuning.{name} is for tuning.form=lora, not {self.form}; leave one of them out")
        if self.form == "vera" and self.rslora:
            raise ValueError("tuning.rslora is not for tuning.form=vera, which has no alpha; leave one of them out")
        if self.dora and self.init in ("pissa", "olora"):
            raise ValueError(f"tuning.dora with tuning.init={self.init} is not supported; leave tuning.init out")
        return self

    @property
    def scale(self) -> float:
        return self.scale_of(self.rank, self.alpha)

    def scale_of(self, rank: int, alpha: float) -> float:
        """What the product of adapters of this rank and alpha is scaled by."""
        return alpha / (rank**0.5 if self.rslora else rank)


class QLora(Lora):
    """`lora` over a base in nf4 (Dettmers et al., 2023)."""

    method: Literal["qlora"]  # type: ignore[assignment]
    base: Base | None = "nf4"
    """Hold the frozen matrices of the layers in 4 bits (nf4 of QLoRA, int4) or 8 (int8, fp8) while training."""


class AdaLora(Adapter):
    """Low-rank adapters in SVD form whose ranks are spread by importance within a budget (Zhang et al., 2023)."""

    method: Literal["adalora"]
    init_rank: int = Field(12, ge=1)
    """Rank of each adapter at first."""
    rank: int = Field(8, ge=1)
    """Average rank at the end."""
    alpha: float = Field(16.0, gt=0)
    """The adapters' product is scaled by alpha / init_rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the adapters' inputs that is dropped in training."""
    targets: str | list[str] = "all-linear"
    """"all-linear" (every matrix of the layers), or regexes on names like layers/3/self_attn/q_proj."""
    warmup: float = Field(0.1, ge=0)
    """How long all ranks train at first: a share of all steps (below 1) or a number of steps."""
    final: float = Field(0.3, ge=0)
    """How long the final ranks train at the end: a share of all steps (below 1) or a number of steps."""
    every: int = Field(10, ge=1)
    """Steps between two reallocations."""
    beta1: float = Field(0.85, gt=0, lt=1)
    """Smoothing of the sensitivity."""
    beta2: float = Field(0.85, gt=0, lt=1)
    """Smoothing of its uncertainty."""
    orthogonal: float = Field(0.5, ge=0)
    """Weight of the penalty that keeps the singular vectors orthogonal."""

    @model_validator(mode="after")
    def _shrinks(self) -> "AdaLora":
        if self.rank > self.init_rank:
            raise ValueError(f"tuning.rank {self.rank} is above tuning.init_rank {self.init_rank}; raise the latter")
        return self


class Lisa(Strict):
    """Embeddings and head, and k layers that are drawn anew every few steps (LISA, Pan et al., 2024)."""

    method: Literal["lisa"]
    layers: int = Field(2, ge=1)
    """How many layers train at a time."""
    every: int = Field(20, ge=1)
    """Steps between two draws."""
    draw: Literal["uniform", "importance"] = "uniform"
    """Layers are equally likely, or as likely as the norm of what they last learned per parameter."""
    train: list[str] = ["embeddings", "head"]
    """What trains all the time, as patterns."""


class GradientSelect(Strict):
    """The matrices whose gradients matter most, within a budget, chosen anew every few steps."""

    method: Literal["gradient_select"]
    budget: float = Field(0.1, gt=0, le=1)
    """Share of the layers' parameters that trains at a time. Of one kind of matrix, at most twice this share of the
    layers: so many slots are held."""
    score: Literal["fisher", "norm", "taylor"] = "fisher"
    """By what a matrix is judged, per parameter: mean squared gradient, its root, or |weight · gradient|."""
    warmup: int = Field(10, ge=1)
    """Steps in which gradients are watched before the first choice; nothing of the layers trains yet."""
    every: int = Field(50, ge=1)
    """Steps between two choices."""
    hysteresis: float = Field(0.2, ge=0)
    """How much better, as a share, a matrix must score to take the place of one that trains."""
    train: list[str] = []
    """What trains all the time, as patterns."""


class Ia3(Adapter):
    """Learned scales of keys, values and the MLP's hidden states (IA³, Liu et al., 2022)."""

    method: Literal["ia3"]
    targets: list[str] = ["k_proj", "v_proj", "down_proj"]
    """Regexes on the names of matrices whose outputs are scaled; of those that match `inputs`, the inputs."""
    inputs: list[str] = ["down_proj"]
    """Matrices whose inputs are scaled instead of their outputs."""


class Prompt(Adapter):
    """Virtual tokens before every text, whose embeddings train (Lester et al., 2021)."""

    method: Literal["prompt"]
    tokens: int = Field(20, ge=1)
    """How many virtual tokens."""
    text: str | None = None
    """A text from whose embeddings they start; else those of tokens drawn from the vocabulary."""
    encoder: Literal["none", "mlp"] = "none"
    """Let a small network make the embeddings in training (P-tuning, Liu et al., 2021); what it makes is exported."""
    encoder_hidden: int = Field(128, ge=1)
    """Width of that network."""


class Prefix(Adapter):
    """Virtual keys and values before every text in each layer (Li & Liang, 2021)."""

    method: Literal["prefix"]
    tokens: int = Field(20, ge=1)
    """How many virtual tokens."""


class Galore(Strict):
    """Every weight trains; matrices' gradients are projected to a low rank for the optimiser (Zhao et al., 2024)."""

    method: Literal["galore"]
    rank: int = Field(128, ge=1)
    """Rank of the projected gradients."""
    every: int = Field(200, ge=1)
    """Steps between two new projections."""
    scale: float = Field(0.25, gt=0)
    """What a projected update is scaled by."""
    targets: str | list[str] = "all-linear"
    """"all-linear" (every matrix of the layers), or regexes on names like layers/3/mlp/up_proj."""


Tuning = Annotated[
    Full | Freeze | Lora | QLora | AdaLora | Lisa | GradientSelect | Ia3 | Prompt | Prefix | Galore,
    Field(discriminator="method"),
]

METHODS: dict[str, type[Strict]] = {
    get_args(c.model_fields["method"].annotation)[0]: c for c in get_args(get_args(Tuning)[0])
}


def lora_unless_said(tuning: Any) -> Any:
    """`tuning.rank=16` alone means LoRA, as leaving the section out does."""
    return {"method": "lora", **tuning} if isinstance(tuning, dict) and "method" not in tuning else tuning
