"""Learning from a teacher: the keys of the section `distill`."""

from typing import Literal

from pydantic import Field, model_validator

from jaxtune.config.base import Strict


class Features(Strict):
    """Hidden states of the student's layers that are to become those of the teacher's."""

    layers: list[tuple[int, int]] = Field(min_length=1)
    """Pairs of layers, the student's and the teacher's, from 0: [[0, 1], [1, 3]]. Where the models' widths differ, the
    student's hidden states go through a matrix that is learned along, and not exported."""
    weight: float = Field(1.0, gt=0)
    """What the sum over pairs is multiplied by."""
    loss: Literal["mse", "cosine"] = "mse"
    """The mean squared error, or 1 - cosine."""


class Attention(Strict):
    """Where heads of the student's layers look, which is to become where those of the teacher's do."""

    layers: list[tuple[int, int]] = Field(min_length=1)
    """Pairs of layers, the student's and the teacher's, from 0. Where the models have not as many heads, their mean is
    compared."""
    weight: float = Field(1.0, gt=0)
    """What the sum over pairs is multiplied by."""
    loss: Literal["kl", "mse"] = "kl"
    """KL(teacher ‖ student) over the keys that a query sees, or the squared error."""


class Distill(Strict):
    """Learning from a teacher, beside the data."""

    teacher: str
    """A model folder, a hub id or a run, of the student's tokenizer."""
    weight: float = Field(0.5, ge=0, le=1)
    """The teacher's share: (1 - weight) · data loss + weight · temperature² · divergence."""
    temperature: float = Field(2.0, gt=0)
    """What both models' logits are divided by before they are compared."""
    kind: Literal["forward", "reverse", "jsd"] = "forward"
    """The divergence: KL(teacher ‖ student), which covers all that the teacher may say; KL(student ‖ teacher), which
    keeps to what it is likely to say; or the generalised Jensen-Shannon divergence between them."""
    beta: float = Field(0.5, gt=0, lt=1)
    """Of "jsd": near 0 it behaves as forward, near 1 as reverse."""
    top_k: int | None = Field(None, ge=1)
    """Write the teacher's likeliest k tokens to disk once, 2 + 4 bytes each (2 + 2 for small vocabularies), instead of
    keeping the teacher beside the student. All other tokens then are one outcome."""
    columns: str | None = None
    """The folder that they are kept in; the user's cache where not given."""
    features: Features | None = None
    """Hidden states to become alike; none where not given."""
    attention: Attention | None = None
    """Where heads look to become alike; none where not given."""
    on_policy: float = Field(0.0, ge=0, le=1)
    """The share of batches whose answers the student says itself, for the live teacher to correct (GKD)."""

    @model_validator(mode="after")
    def _live(self) -> "Distill":
        live = {"features": self.features, "attention": self.attention, "on_policy": self.on_policy}
        if self.top_k is not None and (wants := [k for k, v in live.items() if v]):
            raise ValueError(f"{', '.join(wants)} asks a live teacher; leave top_k out")
        return self
