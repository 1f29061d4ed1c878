"""Processes that agree, and write and read together."""

import re

import pytest

from jaxtune import distributed, log, watch
from jaxtune.errors import UserError
from tests.processes import ended, start, together

AGREE = """
import sys
from jaxtune import distributed
from jaxtune.errors import UserError
distributed.initialize()
i = distributed.index()
distributed.agree("same", {"a": [1, 2]})
try:
    distributed.agree("job", {"config": {"optim": {"learning_rate": 0.1 * (1 + i)}}, "devices": 2})
except UserError as e:
    print(e)
"""
RESTORE = """
import shutil, sys
from pathlib import Path
import jax, numpy as np
from jax.experimental import multihost_utils
from jaxtune import distributed, sharding
from jaxtune.checkpoint import Checkpoints
from jaxtune.config import Mesh
from jaxtune.errors import UserError
distributed.initialize()
folder, what = Path(sys.argv[1]), sys.argv[2]
mesh = sharding.make_mesh(Mesh())
where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
want = np.random.default_rng(0).standard_normal((3, 8, 5)).astype(np.float32)
checkpoints = Checkpoints(folder / "checkpoints")
if what == "save":
    best = Checkpoints(folder / "best")  # two at a time must not wait at each other's barriers
    for n in (5, 6, 7):
        for each in (best, checkpoints):
            each.save(n, {"trainable": {"w": distributed.put(want, where)}}, {"next": 3}, {})
        if n == 5:  # a disk that is full for the first process alone
            usage = shutil.disk_usage
            shutil.disk_usage = lambda path: usage(path)._replace(free=0) if distributed.first() else usage(path)
            try:
                checkpoints.save(n + 1, {"trainable": {"w": distributed.put(want, where)}}, {}, {})
            except UserError as e:
                print(e)
            else:
                raise AssertionError
            shutil.disk_usage = usage
    best.close()
else:
    like = {"trainable": {"w": jax.ShapeDtypeStruct(want.shape, want.dtype, sharding=where)}}
    state, data = checkpoints.restore(7, like)
    got = state["trainable"]["w"]
    assert got.sharding == where and data == {"next": 3}
    for part in got.addressable_shards:
        np.testing.assert_array_equal(np.asarray(part.data), want[part.index])
    whole = distributed.gathered({"w": got})["w"]
    assert (whole is None) != distributed.first()
    if distributed.first():
        np.testing.assert_array_equal(whole, want)
checkpoints.close()
"""


def test_what_differs_between_hosts_is_named_in_all_of_them():
    for done in together(AGREE, 2, 1):
        assert re.search(
            r"process 1 on \S+ differs from process 0 in config.optim.learning_rate \(0.1 there, 0.2 here\); make",
            done.stdout,
        )


@pytest.mark.parametrize(("saves", "restores"), [(2, 1), (1, 2)])
def test_a_checkpoint_is_restored_exactly_by_another_number_of_processes(saves, restores, tmp_path):
    done = together(RESTORE, saves, 2, tmp_path / "c", "save")
    assert "are free); earlier ones are kept; make room" in done[0].stdout
    assert all("another process cannot, and says why" in d.stdout for d in done[1:])
    together(RESTORE, restores, 2, tmp_path / "c", "restore")


def test_alone_nothing_is_joined_and_nothing_is_compared(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    distributed.initialize()
    distributed.agree("x", {"a": object()})
    distributed.wait("x")
    assert (distributed.count(), distributed.first(), log.hushed()) == (1, True, False)
    with watch.watching() as watched:
        assert watched(test_alone_nothing_is_joined_and_nothing_is_compared) is not None


def test_half_a_set_of_variables_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    with pytest.raises(UserError, match=r"'JAX_NUM_PROCESSES' is not right; set JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        distributed.initialize()


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, True),
        ({"SLURM_STEP_NODELIST": "n[1-2]"}, True),
    ],
)
def test_clusters_are_found_by_their_variables(monkeypatch, variables, found):
    for name in (*distributed._CLUSTERS, *distributed._HOSTS):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed._in_cluster() is found


SHARED = """
import sys
from pathlib import Path
from jaxtune import cli, distributed, run
distributed.initialize()
run._VISIBLE_S = 1.0
out = Path(sys.argv[1])
for n in range(2):  # a second run in a session asks with other keys
    with run._alone(out):
        distributed.agree("x", {"n": n})
if distributed.members()[0]:
    out = out.with_name("another disk")
with cli.exit_codes(), run._alone(out):
    pass
"""


def test_a_run_folder_that_not_all_hosts_see_is_refused_by_all(tmp_path):
    for done in ended(start(SHARED, 2, 1, tmp_path / "run")):
        assert done.code == 2, done
        assert re.search(r"error: \S.*: not all hosts see what is written there; choose an output on", done.stderr)
