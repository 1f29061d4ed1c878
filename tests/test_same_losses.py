"""Losses under a mesh that splits time or depth are those of one device."""

import json

import numpy as np

from tests.tiny import make_config, on_eight_devices, write_jsonl, write_tiny

LOSSES = r"""
import json, re, sys
import jax
from jaxtune import blueprint, job, sharding, steps
from jaxtune.config import Config, Mesh
from jaxtune.tuning import method
from jaxtune.training import State
from jaxtune.layers import unbox

MESHES = {
    "one": (1, {"fsdp": 1}),
    "context and rows": (8, {"context": 4, "fsdp": 2}),
    "context, heads and rows": (8, {"context": 2, "tensor": 2, "fsdp": 2}),
    "stages": (8, {"stage": 2, "fsdp": 4}),
}

def losses(config, devices, sizes):
    config = config.model_copy(update={"mesh": Mesh(**sizes)})
    job.sharding.make_mesh = lambda c, d=None: make_mesh(c, jax.devices()[:devices])
    j = job.prepare(config)
    step = steps.compile_step(j)
    with jax.set_mesh(j.mesh):
        b = j.blueprint
        weights = unbox(blueprint.materialise(b, jax.random.key(0)))
        trainable, frozen = method.split(weights, b.labels)
        opt = jax.jit(j.tx.init, out_shardings=jax.tree.map(lambda x: x.sharding, j.state.optimiser))(trainable)
        state = State(trainable, frozen, opt, jax.numpy.int32(0), jax.random.key_data(jax.random.key(0)))
        state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, j.state))
        put, out = steps.putter(j.mesh, config.train.accumulation), []
        batches = j.data.train.batches(config.train.batch_size, seed=0, row_count=None)
        for _ in range(config.train.steps):
            state, report = step(state, put(next(batches)))
            out.append(float(report["loss"]))
    return out, step.as_text()

make_mesh, found = sharding.make_mesh, {}
for file, names in json.loads(sys.argv[2]).items():
    config = Config.model_validate_json(open(file).read())
    for name in names:
        found[f"{file} {name}"], text = losses(config, *MESHES[name])
        gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)
        found[f"gathered {name}"] = [[int(n) for n in shape.split(",")] for shape in gathered]
open(sys.argv[1], "w").write(json.dumps(found))
"""
WHICH = {
    "full": ["context, heads and rows", "stages"],
    "lora": ["context and rows", "stages"],
}


def test_losses_are_those_of_one_device(tmp_path):
    """Packed rows, with rematerialisation, and with micro-batches that add up."""
    model = write_tiny(tmp_path / "model", layers=4, kv_heads=1, tied=False)
    rng = np.random.default_rng(0)
    texts = ["1 + 2 = 3 the fox eats berries"[: 4 + rng.integers(24)] for _ in range(160)]
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": t[:3], "completion": t[3:]} for t in texts])
    methods = {
        "full": {"tuning__method": "full", "train__remat": "full"},
        "lora": {"tuning__rank": 4, "train__accumulation": 2},
    }
    wanted = {}
    for name, changes in methods.items():
        config = make_config(
            model, data, tmp_path / "run", data__packing=True, data__max_length=64, train__batch_size=16,
            train__steps=10, **changes,
        )  # fmt: skip
        file = tmp_path / f"{name}.json"
        file.write_text(config.model_dump_json())
        wanted[str(file)] = ["one", *WHICH[name]]
    on_eight_devices(LOSSES, tmp_path / "losses.json", json.dumps(wanted))
    found = json.loads((tmp_path / "losses.json").read_text())
    for file, (one, *meshes) in wanted.items():
        want = found[f"{file} {one}"]
        assert want[-1] < want[0] - 0.2
        for name in meshes:
            np.testing.assert_allclose(found[f"{file} {name}"], want, rtol=1e-5)
    for name in ("context and rows", "context, heads and rows"):
        whole = [shape for shape in found[f"gathered {name}"] if 64 in shape]
        assert whole
        parts = {tuple(shape[2:]) for shape in whole}
        assert parts <= {(), (1, 8)}, f"{name}: more than keys, values and segments is gathered"
