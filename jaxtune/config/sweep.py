"""The search for good settings: the `sweep` section of a config, which `jaxtune sweep` reads and other verbs ignore."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from jaxtune.config.base import Strict

Value = bool | int | float | str | None | list[str]


class Range(Strict):
    """From a number to a number; whole ones where the key takes whole ones."""

    low: int | float
    """The least value."""
    high: int | float
    """The greatest value."""
    log: bool = False
    """Even on a logarithmic scale, for what spans orders of magnitude."""
    step: int | float | None = None
    """Only low, low + step, …"""

    @model_validator(mode="after")
    def _fits(self) -> "Range":
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log: true needs low above 0, and no step")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step {self.step} is not above 0")
        return self


Tried = Annotated[
    Annotated[Range, Tag("range")] | Annotated[list[Value], Field(min_length=1), Tag("list")],
    Discriminator(lambda given: "list" if isinstance(given, list) else "range"),
]


class Sweep(Strict):
    """Trials of other values of some keys, judged by `evaluate.metric` on the validation set."""

    keys: dict[str, Tried] = Field(min_length=1)
    """Dotted keys with what is tried: {optim.learning_rate: {low: 1e-5, high: 1e-3, log: true}, tuning.rank: [4, 8]}. A
    key of a tuning method that a trial does not have is left out of it."""
    trials: int = Field(20, ge=1)
    """How many, those included that failed or were ended early."""
    sampler: Literal["tpe", "cmaes", "random", "grid"] = "tpe"
    """What draws values: the Tree-structured Parzen Estimator; CMA-ES, for ranges; chance; or each combination once in
    turn."""
    pruner: Literal["none", "asha", "hyperband", "median"] = "none"
    """What ends a trial early, by its evaluations so far against those of others: nothing, asynchronous successive
    halving, Hyperband, or a score below the median. See evaluate.every."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of the sampler."""
    storage: str | None = None
    """The database in which trials are kept, as SQLAlchemy names it (postgresql://…), for several machines; where not
    given, sweep.db in the output folder."""
    timeout: float | None = Field(None, gt=0)
    """Seconds after which no more trials begin."""
    workers: int = Field(1, ge=1)
    """Processes that train trials at the same time."""
    devices: list[str] = []
    """What each worker sees, as CUDA_VISIBLE_DEVICES or TPU_VISIBLE_CHIPS: ["0,1", "2,3"]; all, where not given."""
    keep: Literal["best", "all"] = "best"
    """Which trials keep their checkpoints and are exported. Of the others, configs and metrics stay."""

    @model_validator(mode="after")
    def _one_each(self) -> "Sweep":
        if self.devices and len(self.devices) != self.workers:
            raise ValueError(f"devices are given for {len(self.devices)} workers, and there are {self.workers}")
        return self
