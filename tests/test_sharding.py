import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxtune import sharding
from jaxtune.config import Mesh
from jaxtune.errors import UserError
from jaxtune.layers import Weight
from jaxtune.planning import topology


def mesh(data, fsdp, tensor, **others):
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, **others}
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
        (weight((8, 4), ("embed", "rank")), PartitionSpec(None, None)),  # small
        (weight((3, 4, 8, 2), ("layers", "rank", "heads", "head")), PartitionSpec(None, None, "tensor", None)),
        (weight((2, 2**19, 8), ("layers", "embed", "rank")), PartitionSpec(None, "fsdp", None)),  # 16 MiB a layer
        (weight((9, 2**17, 8), ("layers", "embed", "rank")), PartitionSpec(None, None, None)),
        (weight((6, 8), ("vocab", "embed")), PartitionSpec("tensor", "fsdp")),
    ],
)
def test_weights_lie_by_their_axes(w, spec):
    assert sharding.spec(w, mesh(1, 4, 2)) == spec


def test_experts_lie_by_expert():
    w = weight((2, 8, 16, 2, 6), ("layers", "expert", "embed", "gate_up", "expert_mlp"))
    assert sharding.spec(w, mesh(1, 2, 2, expert=4)) == PartitionSpec(None, "expert", "fsdp", None, "tensor")


def test_context_splits_weights_too_and_stages_split_layers():
    m = mesh(1, 2, 1, context=2, stage=3)
    w = weight((3, 8, 4, 2), ("layers", "embed", "heads", "head"))
    assert sharding.spec(w, m) == PartitionSpec("stage", ("fsdp", "context"), None, None)
    assert sharding.spec(weight((3, 8), ("layers", "embed"), 0), m) == PartitionSpec("stage", None)
    said = []
    tell = lambda what, remedy: said.append(what)  # noqa: E731
    odd = sharding.spec(weight((6, 8), ("embed", "mlp")), m, tell)
    assert (odd, said) == (PartitionSpec("fsdp", None), ["embed 6 over fsdp × context 4"])


@pytest.mark.parametrize(
    ("size", "n", "remedy"),
    [
        (15, 2, "only tensor=1 divides"),
        (12, 8, "tensor=2 or 4 divides"),  # 8 devices: 6 and 12 are no mesh of theirs
        (6, 4, "tensor=2 divides"),
        (1, 2, "only tensor=1 divides"),
    ],
)
def test_what_does_not_divide_is_copied_and_said(size, n, remedy):
    said = []
    m = mesh(1, 8 // n, n)
    table = {"q_proj": weight((8, size), ("embed", "heads"))}
    where = sharding.shardings(table, m, said.append)
    assert where["q_proj"].spec == PartitionSpec("fsdp" if n < 8 else None, None)
    assert said == [
        f"copied to all devices, because they do not divide: heads {size} over tensor {n} (q_proj, …; {remedy})"
    ]


def test_rules_can_be_overridden_and_are_checked():
    own = sharding.rules(Mesh(rules={"vocab": ["tensor", "fsdp"], "embed": None, "mlp": "fsdp"}))
    w = weight((16, 8), ("vocab", "embed"))
    assert sharding.spec(w, mesh(1, 4, 2), table=own) == PartitionSpec(("tensor", "fsdp"), None)
    assert sharding.spec(weight((8, 16), ("embed", "mlp")), mesh(1, 4, 2), table=own) == PartitionSpec(None, "fsdp")
    assert sharding.rules(Mesh()) == sharding.RULES
    for given, said in (
        ({"vocabulary": "fsdp"}, r"mesh.rules: no weight has a dimension 'vocabulary'; did you mean 'vocab'\?"),
        ({"mlp": "tenser"}, r"mesh.rules.mlp: no mesh has an axis 'tenser'; did you mean 'tensor'\?"),
        ({"mlp": ["fsdp", "fsdp"]}, "names an axis twice"),
    ):
        with pytest.raises(UserError, match=said):
            sharding.rules(Mesh(rules=given))


def test_batches_are_split_by_rows_and_along_their_length():
    m = mesh(2, 2, 1, context=2)
    rows = ("data", "fsdp", "expert")
    assert sharding.batch_shards(m) == 4
    assert sharding.batch_sharding(m, 1, "ids_BT").spec == PartitionSpec(None, rows, "context")
    assert sharding.batch_sharding(m, 0, "label_BS").spec == PartitionSpec(rows)
    sharding.check_length(m, 32)
    with pytest.raises(UserError, match="rows of 33 tokens do not divide over context 2; set data.max_length"):
        sharding.check_length(m, 33)


@dataclasses.dataclass(frozen=True)
class Fake:
    """A device of a slice."""

    id: int
    slice_index: int
    platform: str = "fake"
    device_kind: str = "fake"

    @property
    def process_index(self):
        return self.slice_index


def slices(count, each):
    return [Fake(i, i // each) for i in range(count * each)]


def test_one_axis_goes_over_slices():
    m = sharding.make_mesh(Mesh(), slices(2, 4))
    assert (m.shape["data"], m.shape["fsdp"]) == (2, 4)
    assert {d.slice_index for d in m.devices[0, 0].flat} == {0}
    m = sharding.make_mesh(Mesh(fsdp=-1, tensor=2, over_slices="fsdp"), slices(2, 4))
    assert (m.shape["fsdp"], m.shape["tensor"]) == (4, 2)
    assert [[d.slice_index for d in pair] for pair in m.devices.reshape(4, 2)] == [[0, 0], [0, 0], [1, 1], [1, 1]]


@pytest.mark.parametrize(("micro", "rows"), [(1, 8), (2, 8), (1, 7), (3, 9), (1, 1)])
def test_processes_hold_every_row_of_a_batch_once(micro, rows):
    m = sharding.make_mesh(Mesh(), slices(4, 2))
    held = [sharding.own_rows(m, micro, rows, process) for process in range(4)]
    assert sorted(r for own in held for r in own) == list(range(rows))


def test_processes_that_share_rows_hold_the_same_ones():
    m = sharding.make_mesh(Mesh(data=2, over_slices="data", tensor=-1), slices(2, 4))
    assert [sharding.own_rows(m, 1, 4, p) for p in range(2)] == [{0, 1}, {2, 3}]
    m = sharding.make_mesh(Mesh(stage=2, over_slices="stage", fsdp=-1), slices(2, 4))
    assert sharding.own_rows(m, 1, 4, 0) == sharding.own_rows(m, 1, 4, 1) == set(range(4))


def test_slices_of_another_machine_are_rehearsed_on_a_cpu():
    cpus = [Fake(i, 0, platform="cpu") for i in range(8)]
    assert dict(sharding.make_mesh(Mesh(slices=2), cpus).shape) == dict(sharding.make_mesh(Mesh(), slices(2, 4)).shape)


@pytest.mark.skipif(not topology.has_compiler(), reason="libtpu is not installed")
@pytest.mark.parametrize("name", ["v5p:4x4x4", "v6e:4x4", "v5p:2x2x4"])
def test_axes_of_tpus_are_split_where_a_strategy_wants_it(name):
    devices = topology.devices(topology.parse(name))
    m = sharding.make_mesh(Mesh(strategy="fsdp_tensor"), devices)
    assert (m.shape["fsdp"], m.shape["tensor"]) == (len(devices) // 2, 2)
    assert {d.id for d in m.devices.flat} == {d.id for d in devices}
    assert sharding.make_mesh(Mesh(strategy="context"), devices).shape["context"] == len(devices)


def test_meshes_that_do_not_fit_slices_are_refused():
    with pytest.raises(UserError, match=r"mesh.slices=3: the 8 devices are of 2; leave it out"):
        sharding.make_mesh(Mesh(slices=3), slices(2, 4))
    with pytest.raises(UserError, match=r"data 1 does not divide over 2 slices; set mesh.data=2 or a multiple"):
        sharding.make_mesh(Mesh(data=1), slices(2, 4))
    with pytest.raises(UserError, match="is not the 8 devices"):
        sharding.make_mesh(Mesh(fsdp=4, data=4), slices(2, 4))


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


def test_optimiser_state_of_fewer_layers_is_not_split_over_stages():
    m = mesh(1, 2, 1, stage=2)
    where = jax.sharding.NamedSharding(m, PartitionSpec("stage", "fsdp", None))
    trainable = {"layers_0-3": {"w": jax.ShapeDtypeStruct((4, 8, 4), np.float32, sharding=where)}}
    one = {"layers_0-3": {"w": jax.ShapeDtypeStruct((1, 8, 4), np.float32)}}
    tx = optax.GradientTransformation(lambda params: one, lambda *a: a)
    found = sharding.optimiser_shardings(tx, trainable, m)
    assert found["layers_0-3"]["w"].spec == PartitionSpec(None, "fsdp", None)
