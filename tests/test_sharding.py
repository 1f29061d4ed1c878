import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxtune import sharding
from jaxtune.config import Mesh
from jaxtune.errors import UserError
from jaxtune.layers import Weight


def mesh(data, fsdp, tensor, expert=1):
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "expert": expert}
    n = len(sharding.AXES)
    return AbstractMesh(tuple(sizes.get(a, 1) for a in sharding.AXES), sharding.AXES, axis_types=(AxisType.Auto,) * n)


def weight(shape, names, n_in=1):
    return Weight(jax.ShapeDtypeStruct(shape, np.float32), names, n_in=n_in)


@pytest.mark.parametrize(
    ("w", "spec"),
    [
        (weight((8, 16), ("embed", "mlp")), PartitionSpec("fsdp", "tensor")),
        (weight((3, 8, 4, 2), ("layers", "embed", "heads", "head")), PartitionSpec(None, "fsdp", "tensor", None)),
        (weight((3, 4, 2, 8), ("layers", "heads", "head", "embed"), 2), PartitionSpec(None, "tensor", None, "fsdp")),
        (weight((3, 8), ("layers", "embed"), 0), PartitionSpec()),
        (weight((8, 4), ("embed", "rank")), PartitionSpec("fsdp", None)),
        (weight((6, 8), ("vocab", "embed")), PartitionSpec("tensor", "fsdp")),
    ],
)
def test_weights_lie_by_their_axes(w, spec):
    assert sharding.spec(w, mesh(1, 4, 2)) == spec


def test_experts_lie_by_expert():
    w = weight((2, 8, 16, 2, 6), ("layers", "expert", "embed", "gate_up", "expert_mlp"))
    assert sharding.spec(w, mesh(1, 2, 2, 4)) == PartitionSpec(None, "expert", "fsdp", None, "tensor")


def test_what_does_not_divide_is_copied_and_said():
    said = []
    assert sharding.spec(weight((8, 15), ("embed", "mlp")), mesh(1, 4, 2), said.append) == PartitionSpec("fsdp", None)
    assert said == ["mlp 15 over tensor 2"]


def test_a_mesh_takes_all_devices():
    m = sharding.make_mesh(Mesh(), jax.devices())
    assert dict(m.shape) == {**dict.fromkeys(sharding.AXES, 1), "fsdp": jax.device_count()}
    with pytest.raises(UserError, match=r"fsdp 3 .*is not the 1 devices"):
        sharding.make_mesh(Mesh(fsdp=3), jax.devices()[:1])


def test_optimiser_state_lies_with_its_parameter():
    m = sharding.make_mesh(Mesh(), jax.devices())
    where = jax.sharding.NamedSharding(m, PartitionSpec("fsdp"))
    trainable = {"w": jax.ShapeDtypeStruct((8, 4), np.float32, sharding=where)}
    for tx in (optax.adam(1e-3), optax.adafactor(1e-3)):
        state = sharding.optimiser_shardings(tx, trainable, m)
        leaves = jax.tree.leaves(state)
        assert len(leaves) == len(jax.tree.leaves(jax.eval_shape(tx.init, trainable)))
        assert all(isinstance(s, jax.sharding.NamedSharding) for s in leaves)
    adam = sharding.optimiser_shardings(optax.adam(1e-3), trainable, m)
    assert adam[0].mu["w"] == where
