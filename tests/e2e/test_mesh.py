"""The same run on one device and on eight: losses agree, whatever the mesh."""

import json

import numpy as np

from jaxtune import log, run
from tests.tiny import make_config, on_eight_devices

SCRIPT = """
import json, sys
from pathlib import Path
import jax
from jaxtune import job as jobs, log, run
from tests.tiny import make_config, on_eight_devices
assert jax.device_count() == 8
model, data, out = (Path(a) for a in sys.argv[1:4])
for i, mesh in enumerate(json.loads(sys.argv[4])):
    for k in json.loads(sys.argv[6])[i]:
        method = json.loads(sys.argv[5])[k]
        folder = out / f"{i}-{method['method']}"
        run.train(make_config(model, data, folder, mesh=mesh, tuning=method, train__steps=int(sys.argv[7])))
full = make_config(model, data, out / "x", mesh={"fsdp": 4, "tensor": 2}, tuning={"method": "full"})
state = jobs.prepare(full).state
print("SPECS", {str(s.sharding.spec) for s in jax.tree.leaves(state.optimiser)})
"""
METHODS = [
    {"method": "lora", "rank": 2},
    {"method": "freeze", "last": 1},
    {"method": "qlora", "rank": 2, "dora": True, "group": 8},
]
MESHES = [{"strategy": "fsdp"}, {"strategy": "fsdp_tensor", "data": 2}, {"strategy": "replicated"}]
WHICH = [[0, 1], [1, 2], [0]]  # the methods of each mesh
STEPS = 10


def test_every_mesh_gives_the_same_losses(tiny, sums_file, tmp_path):
    """A batch of 4 does not divide over 8: it is filled up with empty rows."""
    done = on_eight_devices(
        SCRIPT, tiny, sums_file, tmp_path, json.dumps(MESHES), json.dumps(METHODS), json.dumps(WHICH), STEPS
    )
    assert "4 sequences do not divide over 8 parts of the batch: 4 empty ones are added" in done.stderr
    assert "'fsdp', 'tensor'" in done.stdout.split("SPECS")[1]
    for k, method in enumerate(METHODS):
        name = method["method"]
        want = losses(run.train(make_config(tiny, sums_file, tmp_path / name, tuning=method, train__steps=STEPS)))
        assert len(want) == STEPS
        for i in [i for i, methods in enumerate(WHICH) if k in methods]:
            np.testing.assert_allclose(losses(tmp_path / f"{i}-{name}"), want, rtol=1e-5)


def losses(folder):
    return [m["loss"] for m in log.read_metrics(folder / "metrics.jsonl") if "loss" in m]
