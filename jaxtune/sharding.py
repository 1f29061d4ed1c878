"""The device mesh, and where every weight, adapter and optimiser state lies on it, from the weights' logical axes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune.config import Mesh as MeshConfig
from jaxtune.errors import UserError
from jaxtune.layers import BATCH_AXES, Weight, is_weight
from jaxtune.weights import owner, path_name

HOST = "pinned_host"  # the kind of memory that optimiser state is offloaded to
AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")
RULES: Mapping[str, str | None] = {  # logical axis of a weight -> mesh axis
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "qkv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "expert_mlp": "tensor",
    "vocab": "tensor",
    "head": None,
    "gate_up": None,
    "router": None,
    "classes": None,
    "layers": None,
    "rank": None,
    "virtual": None,
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """A mesh with all axes over all devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.sizes[a] for a in AXES]
    n, known = len(devices), int(np.prod([s for s in sizes if s > 0]))
    if -1 in sizes and n % known == 0:
        sizes[sizes.index(-1)] = n // known
    if int(np.prod(sizes)) != n:
        wish = " × ".join(f"{a} {s}" for a, s in zip(AXES, sizes, strict=True))
        raise UserError(f"mesh: {wish} is not the {n} devices that there are; set one axis to -1")
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, devices=devices, axis_types=auto)


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """Into how many parts a batch is split."""
    return int(np.prod([mesh.shape[a] for a in BATCH_AXES]))


def batch_sharding(mesh: jax.sharding.Mesh, lead: int = 0) -> NamedSharding:
    """The sharding of a batch column, after `lead` axes that are not split."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * lead, BATCH_AXES))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def spec(w: Weight, mesh: jax.sharding.Mesh, whole: Callable[[str], object] = lambda axis: None) -> PartitionSpec:
    """The mesh axes of one weight. Vectors are copied; a dimension that does not divide is too, and told to `whole`."""
    if len(w.names) - int(w.stacked) == 1:
        return PartitionSpec()
    axes: list[str | None] = []
    for size, name in zip(w.value.shape, w.names, strict=True):
        axis = RULES[str(name)]
        if axis is not None and size % mesh.shape[axis]:
            whole(f"{name} {size} over {axis} {mesh.shape[axis]}")
            axis = None
        axes.append(axis if axis not in axes else None)
    return PartitionSpec(*axes)


def shardings(weights: Any, mesh: jax.sharding.Mesh, warn: Callable[[str], None]) -> Any:
    """A sharding for each `Weight` of a tree; dimensions that do not divide are named once."""
    odd: dict[str, str] = {}

    def one(path: tuple, w: Weight) -> NamedSharding:
        return NamedSharding(mesh, spec(w, mesh, lambda what: odd.setdefault(what, path_name(path))))

    tree = jax.tree_util.tree_map_with_path(one, weights, is_leaf=is_weight)
    if odd:
        warn(f"copied to all devices, because they do not divide: {', '.join(f'{k} ({v}, …)' for k, v in odd.items())}")
    return tree


def optimiser_shardings(
    tx: optax.GradientTransformation, trainable: Any, mesh: jax.sharding.Mesh, offload: bool = False
) -> Any:
    """Optimiser state lies where its parameter lies; factored and scalar state is copied.

    A leaf belongs to the parameter with whose path its own ends. It may hold fewer layers of it, which are not split.
    `trainable` has abstract leaves with shardings. With `offload` what is as large as its parameter lies in the host's
    memory, see `optim.one_at_a_time`; the rest is small.

    Raises:
      UserError: state is to be offloaded, and the devices' host has no memory that they can reach.
    """
    if offload:
        check_host_memory(mesh)
    own = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(trainable)}

    def one(path: tuple, s: Any) -> Any:
        name = owner(path_name(path), own)
        if name is None:
            return replicated(mesh)
        p = own[name]
        layers = s.ndim == p.ndim and s.shape[1:] == p.shape[1:] and name.startswith("layers_")
        if not (s.shape == p.shape or layers):
            return replicated(mesh)
        return p.sharding.with_memory_kind(HOST) if offload else p.sharding

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(tx.init, trainable))


def check_host_memory(mesh: jax.sharding.Mesh) -> None:
    """Look whether the devices of a mesh reach memory of their host.

    Raises:
      UserError: they do not.
    """
    device = mesh.devices.flat[0]
    if HOST not in (kinds := [m.kind for m in device.addressable_memories()]):
        raise UserError(
            f"optim.offload: {device.device_kind} has memory of the kinds {', '.join(kinds)} and none of its host's "
            f"({HOST}); leave optim.offload out"
        )
