"""The processes of a run: one on a laptop, one for each host of a slice."""

import jax


def index() -> int:
    """Which process this is, from 0."""
    return jax.process_index()


def count() -> int:
    """How many there are."""
    return jax.process_count()


def first() -> bool:
    """Whether this is the process that speaks and writes for all."""
    return index() == 0
