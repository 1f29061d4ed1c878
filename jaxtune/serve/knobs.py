"""Our own knobs of a job: `jaxtune` in the body of a request, `extra_body={"jaxtune": {…}}` of OpenAI's client."""

from typing import Literal

from pydantic import Field, model_validator

from jaxtune.serve.bodies import Body, Text


class Knobs(Body):
    """How a job trains, beyond what OpenAI's parameters say. What is not given is chosen by rule.

    >>> Knobs(rank=4).given()
    {'rank': 4}
    """

    tuning: Literal["lora", "qlora", "full", "freeze"] = "lora"
    """What trains: low-rank adapters, the same over a base in four bits, every weight, or the last layers."""
    rank: int | None = Field(None, ge=1, le=256)
    """Rank of the adapters; for lora and qlora."""
    alpha: float | None = Field(None, gt=0, le=4096)
    """Their product is scaled by alpha / rank; for lora and qlora."""
    last: int | None = Field(None, ge=1, le=1024)
    """How many of the last layers train; freeze wants it."""
    max_length: int | None = Field(None, ge=32)
    """Tokens of an example; longer ones are cut at their end."""
    learning_rate: float | None = Field(None, gt=0, le=1)
    """The highest learning rate, in the place of what learning_rate_multiplier makes."""
    packing: bool | None = None
    """Several examples in one row, that never see each other."""
    template: Text | None = Field(None, pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """The name of a chat template that jaxtune knows, where the model's own is not wanted."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What activations and frozen weights are computed in."""

    @model_validator(mode="after")
    def _fits(self) -> "Knobs":
        if self.tuning not in ("lora", "qlora") and (self.rank is not None or self.alpha is not None):
            raise ValueError(f"rank and alpha are for lora and qlora, not for {self.tuning}; leave them out")
        if (self.tuning == "freeze") != (self.last is not None):
            raise ValueError("freeze wants `last`, the number of last layers that train, and nothing else does")
        return self

    def given(self) -> dict[str, object]:
        """What was said, by name."""
        return self.model_dump(exclude_none=True, exclude_unset=True)
