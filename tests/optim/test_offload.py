"""Optimiser state in the host's memory: it lies there, and changes nothing else."""

import shutil

import jax
import numpy as np
import pytest

from jaxtune import job as jobs
from jaxtune import log, run
from tests.tiny import make_config


def losses(folder):
    return [m["loss"] for m in log.read_metrics(folder / "metrics.jsonl") if "loss" in m]


def weights(folder):
    return (folder / "export/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"train__ema": 0.9, "optim__name": "adamw8bit"},
        {"optim__name": "schedule_free", "optim__schedule": "constant"},
    ],
)
def test_state_lies_on_the_host_and_losses_are_the_same(tiny, sums_file, tmp_path, keys):
    keys = {"tuning": {"method": "full"}, "data__validation": 4, "evaluate__every": 3, **keys}
    want = run.train(make_config(tiny, sums_file, tmp_path / "device", **keys))
    c = make_config(tiny, sums_file, tmp_path / "host", optim__offload=True, **keys)
    state = jobs.prepare(c).state
    shapes = {x.shape for x in jax.tree.leaves(state.trainable)}
    for x in jax.tree.leaves(state.optimiser):
        assert x.sharding.memory_kind == ("pinned_host" if x.shape in shapes else "device")
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.trainable)} == {"device"}
    np.testing.assert_array_equal(losses(run.train(c)), losses(want))
    assert weights(tmp_path / "host") == weights(want)


def test_a_stopped_run_goes_on_with_and_without(tiny, sums_file, tmp_path):
    """State saved from the host is restored to the host, and to devices, bit by bit."""
    keys = {"tuning": {"method": "full"}, "checkpoint__every": 2, "checkpoint__keep": 9}
    whole = run.train(make_config(tiny, sums_file, tmp_path / "whole", optim__offload=True, **keys))
    for offload in (True, False):
        folder = tmp_path / str(offload)
        shutil.copytree(whole / "checkpoints/4", folder / "checkpoints/4")
        run.train(make_config(tiny, sums_file, folder, optim__offload=offload, **keys))
        assert weights(folder) == weights(whole)


def test_layers_inputs_on_the_host_change_nothing(tiny, sums_file, tmp_path):
    runs = [
        losses(run.train(make_config(tiny, sums_file, tmp_path / remat, train__remat=remat)))
        for remat in ("full", "offload")
    ]
    np.testing.assert_array_equal(*runs)
