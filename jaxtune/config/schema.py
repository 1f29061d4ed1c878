"""The keys of a config, each documented where it is declared, with its default."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jaxtune.config.base import Strict
from jaxtune.config.distill import Distill
from jaxtune.config.sweep import Sweep
from jaxtune.config.track import Track
from jaxtune.config.tuning import Lora, Tuning, lora_unless_said

DEMO = "demo"  # names the model and the data that come with the package


Format = Literal[
    "auto", "messages", "sharegpt", "prompt_completion", "alpaca", "text", "segments", "tokens", "preference", "kto",
    "classification", "regression", "qa", "translation", "summarisation", "maths", "token_classification", "choice",
]  # fmt: skip


class Source(Strict):
    """One set of data."""

    path: str
    """A file, a folder, a pattern such as data/*.jsonl, hf://owner/name, or an object store's gs://… address; or, where
    data.registry is given, a name in it."""
    format: Format = "auto"
    """What a row holds; "auto" looks at the columns of the first row."""
    columns: dict[str, str] = {}
    """Names of the columns in the file, where they differ: {prompt: question, completion: answer}; "" means none."""
    tags: dict[str, str] = {}
    """Names inside of messages, where they differ: {role: from, content: value, user: human, assistant: gpt}. Also
    separator, what stands between an alpaca instruction and its input: an empty line where not given."""
    split: str = "train"
    """Which split of a hub data set."""
    subset: str | None = None
    """Which configuration of a hub data set."""
    max_samples: int | None = Field(None, gt=0)
    """Take only the first n rows."""
    weight: float = Field(1.0, gt=0)
    """How often each row counts where sets are concatenated (0.5: half of them, drawn by the seed; 2: twice); the share
    of rows where they are interleaved."""


class Data(Strict):
    """What is trained on, and how text becomes tokens."""

    train: str | list[Source] = DEMO
    """A file, a folder, a pattern, an address, "demo", or a list of sources."""
    validation: Annotated[float, Field(ge=0)] | str | list[Source] = 0.0
    """Held out: a fraction (below 1), a number of examples, or data of its own."""
    format: Format = "auto"
    """Format of the sources that name none."""
    columns: dict[str, str] = {}
    """Columns of the sources that name none."""
    tags: dict[str, str] = {}
    """Tags of the sources that name none."""
    registry: str | None = None
    """A dataset_info.json as LLaMA-Factory has it, or its folder; sources are then names in it."""
    mix: Literal["concat", "interleave_under", "interleave_over"] = "concat"
    """Several sets one after the other, or drawn from in turn by weight until the first is used up ("under") or the
    last is ("over", the others begin again)."""
    streaming: bool = False
    """Read rows as they are needed instead of all before the first step; needs train.steps."""
    shuffle_buffer: int = Field(10_000, ge=1)
    """Rows among which streaming draws the next."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """A row that cannot be read ends the run with its place, or is left out and counted."""
    max_length: int = Field(1024, ge=8)
    """Tokens in a row; longer examples are cut, longer texts go into pieces."""
    truncate: Literal["right", "left", "middle", "drop"] = "right"
    """Where an example that is too long is cut: its end, its beginning, its middle; or it is left out. The question
    before the first answer that stays, and the assistant's header, are kept."""
    stride: int = Field(128, ge=0)
    """Tokens that the windows over a long context share, in extractive question answering."""
    packing: bool | None = None
    """Several examples in a row; they never see each other. Without it rows go into buckets of similar length. Where
    not given, texts are packed, and what a head is trained on is not."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Loss on every assistant turn, on the last one only, or on the prompt too."""
    train_on_space: bool = False
    """Loss also on the white space that a template writes after an answer's last token, as LLaMA-Factory has it."""
    template: str = "auto"
    """Chat template: "auto" takes the tokenizer's own, else one that suits the data; or a name, or a Jinja file."""
    thinking: Literal["auto", "on", "off", "keep"] = "auto"
    """Reasoning before answers, for templates that know it: as the template does by itself, asked for, not asked for,
    or kept in earlier turns too."""
    prompt: str | None = None
    """How a task asks, with columns in braces: "Translate to German: {source}"; the task's own where not given."""
    system: str | None = None
    """A system message for conversations that have none."""
    labels: list[str] = []
    """Names of the labels in their order; where not given, those of the training data, sorted."""
    workers: int | None = Field(None, ge=0)
    """Processes that turn text into tokens; 0 is this one; where not given, as many as are worth it."""
    cache: bool = True
    """Keep tokens on disk, by a hash of all that they depend on, so that the next run need not make them again."""

    @property
    def sources(self) -> list[Source]:
        given = [Source(path=self.train)] if isinstance(self.train, str) else self.train
        return [self._filled(s) for s in given]

    @property
    def validation_sources(self) -> list[Source]:
        given = [Source(path=self.validation)] if isinstance(self.validation, str) else self.validation
        return [self._filled(s) for s in given] if isinstance(given, list) else []

    def _filled(self, s: Source) -> Source:
        update: dict[str, Any] = {}
        if s.format == "auto":
            update["format"] = self.format
        if not s.columns:
            update["columns"] = self.columns
        if not s.tags:
            update["tags"] = self.tags
        return s.model_copy(update=update)


class Group(Strict):
    """Parameters with a learning rate or decay of their own."""

    match: str
    """A regex on parameter names like layers/3/mlp/up_proj/weight; also "embeddings", "head", "norms", "biases"."""
    learning_rate: float | None = Field(None, ge=0)
    """Their highest learning rate; optim.learning_rate where not given. It follows the same schedule."""
    weight_decay: float | None = Field(None, ge=0)
    """Their weight decay; optim.weight_decay where not given."""


class Optim(Strict):
    """The optimiser and its learning rate over time."""

    name: Literal["adamw", "adamw8bit", "adafactor", "lion", "sgd", "muon", "schedule_free"] = "adamw"
    """Which optimiser. adamw8bit is AdamW with its moments in 8 bits; muon orthogonalises the updates of the layers'
    matrices and takes AdamW for the rest; schedule_free is AdamW by averaging, with schedule: constant."""
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
    groups: list[Group] = []
    """Parameters with a learning rate or decay of their own; the first that matches holds."""
    offload: bool = False
    """Keep the optimiser's state in the host's memory between updates."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each layer's learning rate over that of the layer above; the embeddings' is below the first layer's."""


class Train(Strict):
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
    """Activations and frozen weights."""
    remat: Literal["none", "dots", "full", "offload"] = "full"
    """What the backward pass computes again: nothing, all but matrix products, or each layer whole; "offload" is the
    last with the layers' inputs kept in the host's memory."""
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """The kernel of attention: what is fastest where it runs, or the one named. splash is for TPUs, cudnn for GPUs."""
    matmuls: Literal["same", "int8", "fp8"] = "same"
    """Matrix products with the layers' weights: in the compute dtype, or rounded to 8 bits (needs the extra [quant]).
    The products alone are twice as fast, where the chip has units for them: int8 on TPU v5e, v5p and v6e and on GPUs
    since A100, fp8 on TPU 7x, H100 and L4."""
    qat: Literal["none", "int4", "int8", "fp8"] = "none"
    """Train for `jaxtune quantize --method rtn --dtype …`: the layers' matrices, adapters merged, are rounded wherever
    they are multiplied, and gradients pass straight through. What is exported whole lies on the grid."""
    qat_group: int = Field(128, ge=0)
    """Inputs of a matrix that share a scale there, as `--group`; 0: all inputs of an output do, as in fp8 always."""
    reduce_dtype: Literal["float32", "bfloat16"] | None = None
    """In what gradients are added up over devices; where not given, as they are computed."""
    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """When a loss or gradient is not finite: end the run, leave the step's update out, or go on from the last
    checkpoint without its rows."""
    spike: float | None = Field(6.0, gt=0)
    """Warn of a loss so many standard deviations above its running mean; null does not."""
    profile: str | None = Field(None, pattern=r"^\d+:\d+$")
    """Write a trace of these steps, such as 10:13 (both are in it), for xprof into the run folder's `profile/`."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of adapters, dropout, the shuffle and the split."""
    log_every: int = Field(10, ge=1)
    """Steps between lines of the log."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Trained weights and the optimiser's state; bfloat16 halves their memory and loses small updates."""
    neftune: float = Field(0.0, ge=0)
    """Noise on the embeddings in training, as alpha of NEFTune (Jain et al., 2023), which takes 5 to 15; 0 is none."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of a moving average of the trained weights, which is then measured and exported; 0 is none."""
    router_loss: float | None = Field(None, ge=0)
    """Weight of the load-balancing loss of a mixture of experts; where not given, the model's own
    router_aux_loss_coef if its config sets output_router_logits, else 0."""

    @property
    def qat_inputs(self) -> int:
        """`qat_group` as `jaxtune quantize` has it: of fp8 it writes a scale for each output."""
        return 0 if self.qat == "fp8" else self.qat_group

    @model_validator(mode="after")
    def _rounds_once(self) -> "Train":
        if self.qat != "none" and self.matmuls != "same":
            raise ValueError(f"qat={self.qat} and matmuls={self.matmuls} both round products; leave one of them out")
        return self

    @model_validator(mode="after")
    def _profile_rises(self) -> "Train":
        first, last = map(int, (self.profile or "1:1").split(":"))
        if not 1 <= first <= last:
            raise ValueError(f"profile {self.profile}: the first step is 1, and the last not before the first")
        return self


class Vocabulary(Strict):
    """Tokens beyond those that the model has."""

    add: list[str] = []
    """Tokens to add to the tokenizer. Their embeddings start as the mean of the others."""
    special: list[str] = []
    """The same as special tokens, which decoding may skip."""
    grow: bool = False
    """Grow the embedding table where the tokenizer is larger than it."""
    multiple: int = Field(1, ge=1)
    """Pad the table to a multiple of this, so that it divides over devices. Padding is never likely nor exported."""


class Evaluate(Strict):
    """Measuring on the validation set while training."""

    every: int = Field(100, ge=0)
    """Steps between evaluations, or 0: one a pass over the data; there is one before the first step and one after the
    last."""
    batch_size: int | None = Field(None, ge=1)
    """Sequences per evaluation step; train.batch_size / train.accumulation where not given."""
    task: str | None = None
    """Answer the validation set and score the answers as this task does: classification, qa, translation,
    summarisation, dialogue, maths, choice. An objective with a head of its own is scored without being asked."""
    metric: str = "loss"
    """Which score decides what is best: loss, perplexity, accuracy, or one of the task's."""
    best: bool = False
    """Export the weights that scored best by `metric` instead of the last."""
    patience: int | None = Field(None, ge=1)
    """Stop when so many evaluations in a row brought no better `metric`."""
    max_samples: int | None = Field(None, ge=1)
    """Answer only the first n examples of the validation set while training."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest answer; the task's own bound where not given."""


class Checkpoint(Strict):
    """Saving and starting again."""

    every: int = Field(200, ge=0)
    """Steps between checkpoints, or 0: one a pass over the data; the last step is always saved."""
    keep: int = Field(3, ge=1)
    """How many checkpoints stay."""
    export: bool = False
    """Also write each checkpoint as a Hugging Face folder to exports/step-N, as many as are kept; those of a stop or of
    SAVE_NOW are not."""
    resume: Literal["auto", "never"] = "auto"
    """"auto" goes on from the newest checkpoint of the output folder; "never" wants a new folder."""


STRATEGIES: dict[str, dict[str, int]] = {  # sizes of mesh axes that are not given; the others are 1
    "fsdp": {"fsdp": -1},
    "fsdp_tensor": {"fsdp": -1, "tensor": 2},
    "context": {"context": -1},
    "expert": {"expert": -1},
    "stage": {"fsdp": -1, "stage": 2},
    "replicated": {"data": -1},
}


class Mesh(Strict):
    """How many devices split what. One axis may be -1 and takes all that are left; axes that are not given are as the
    strategy says."""

    strategy: Literal["fsdp", "fsdp_tensor", "context", "expert", "stage", "replicated"] = "fsdp"
    """What takes the devices: "fsdp" splits the batch and the weights; "fsdp_tensor" also heads and MLP in two;
    "context" splits rows along their length, and the weights; "expert" splits the experts of a mixture; "stage" splits
    layers in two and the rest as fsdp; "replicated" copies the weights and splits the batch."""
    data: int | None = None
    """Split the batch; weights are copied."""
    fsdp: int | None = None
    """Split the batch and the weights."""
    expert: int | None = None
    """Split the batch, and the experts of a mixture."""
    context: int | None = None
    """Split rows along their length, for long ones, and the weights."""
    tensor: int | None = None
    """Split heads, MLP and vocabulary."""
    stage: int | None = None
    """Split the layers into stages of a pipeline."""
    slices: int | None = Field(None, ge=1)
    """TPU slices that the data-centre network joins; where not given, as many as there are."""
    over_slices: Literal["data", "fsdp", "stage"] = "data"
    """The axis that goes over slices."""
    rules: dict[str, str | list[str] | None] = {}
    """Mesh axes that a weight's dimension is split over, where they are not to be the strategy's: {vocab: fsdp, mlp:
    [tensor, fsdp], embed: null}."""

    @property
    def sizes(self) -> dict[str, int]:
        """Each axis with its size, of which one may be -1."""
        given = {a: getattr(self, a) for a in ("data", "fsdp", "expert", "context", "tensor", "stage")}
        usual = STRATEGIES[self.strategy]
        if -1 in given.values():  # takes what the strategy's axis would
            usual = {a: n for a, n in usual.items() if n != -1}
        return {a: usual.get(a, 1) if n is None else n for a, n in given.items()}

    @model_validator(mode="after")
    def _check(self) -> "Mesh":
        sizes = list(self.sizes.values())
        if any(n == 0 or n < -1 for n in sizes):
            raise ValueError("each axis is a positive number of devices, or -1 for all that are left")
        if sizes.count(-1) > 1:
            raise ValueError("only one axis can be -1; set the others, such as mesh.fsdp=1")
        return self


class Config(Strict):
    """A whole run.

    >>> Config(model="demo").tuning.method
    'lora'
    """

    model: str = DEMO
    """A model folder in Hugging Face format or a cache of one, here or at gs://…, a hub id, or "demo"."""
    output: str = "runs/run"
    """The run folder."""
    data: Data = Data()
    vocabulary: Vocabulary = Vocabulary()
    objective: Literal["sft", "pretrain", "classification", "regression", "span_qa", "token_classification"] = "sft"
    """Next-token loss on the answers ("sft") or on all text ("pretrain"); or a head of its own in the place of the
    language model's: labels or a number for a text, the span of an answer, a tag for each word."""
    distill: Distill | None = None
    """A teacher to learn from beside the data, with objective sft or pretrain; none where not given."""
    tuning: Tuning = Lora()
    optim: Optim = Optim()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    mesh: Mesh = Mesh()
    track: Track = Track()
    sweep: Sweep | None = None
    """What `jaxtune sweep` tries; other verbs leave it aside."""

    @model_validator(mode="before")
    @classmethod
    def _method(cls, tree: Any) -> Any:
        return {**tree, "tuning": lora_unless_said(tree["tuning"])} if "tuning" in tree else tree

    @model_validator(mode="after")
    def _taught_by_text(self) -> "Config":
        if self.distill is not None and self.objective not in ("sft", "pretrain"):
            raise ValueError(f"distill goes with objective sft and pretrain, not {self.objective}")
        return self

    @model_validator(mode="after")
    def _accumulation_divides(self) -> "Config":
        if self.train.batch_size % self.train.accumulation:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} is not a multiple of "
                f"train.accumulation {self.train.accumulation}"
            )
        return self
