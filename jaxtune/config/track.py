"""The keys of the trackers that a run reports to."""

from typing import Literal

from jaxtune.config.base import Strict


class Track(Strict):
    """Where a run's numbers go besides its folder. Nothing is sent anywhere unless a tracker is named here; accounts,
    servers and modes are each tracker's own, by its environment variables (WANDB_MODE=offline, WANDB_ENTITY,
    MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID)."""

    to: list[Literal["wandb", "trackio", "mlflow"]] = []
    """Trackers, each of an extra of the same name. The run folder has TensorBoard events in any case."""
    project: str = "jaxtune"
    """What runs that are to be compared have in common; MLflow's experiment."""
    name: str | None = None
    """The run's name there; that of its folder where not given."""
    group: str | None = None
    """A name that several runs share, such as the trials of a search."""
    tags: list[str] = []
    """Words to find the run by."""
