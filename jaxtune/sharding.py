"""The device mesh, and where every weight, adapter and optimiser state lies on it, from the weights' logical axes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune.config import Mesh as MeshConfig
from jaxtune.errors import UserError, nearest
from jaxtune.layers import BATCH_AXES, Weight, is_weight
from jaxtune.weights import owner, path_name

HOST = "pinned_host"  # the kind of memory that optimiser state is offloaded to
AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")
Rules = Mapping[str, tuple[str, ...]]
_GATHERED = ("fsdp", "context")  # axes over which a weight is split to save memory, and gathered where it multiplies
_SMALL = 8 * 2**20  # bytes of a layer's adapter
RULES: Rules = {  # logical axis of a weight -> the mesh axes that split it, the outer one first
    "layers": ("stage",),
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "qkv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "expert_mlp": ("tensor",),
    "vocab": ("tensor",),
    "head": (),
    "gate_up": (),
    "router": (),
    "classes": (),
    "rank": (),
    "virtual": (),
}


# --- the mesh ---------------------------------------------------------------------------------------------------------


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """A mesh with all axes over all devices; where these are of several slices, one axis goes over slices.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or do not divide over the slices.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    rehearsed = devices[0].platform == "cpu" and config.slices is not None  # slices of another machine
    if rehearsed:
        slices = config.slices or 1
    elif config.slices not in (None, slices):
        raise UserError(f"mesh.slices={config.slices}: the {len(devices)} devices are of {slices}; leave it out")
    over, wanted = config.over_slices, dict(config.sizes)
    if slices > 1 and wanted[over] == 1 and getattr(config, over) is None:
        wanted[over] = slices
    sizes = [wanted[a] for a in AXES]
    n, known = len(devices), int(np.prod([s for s in sizes if s > 0]))
    if -1 in sizes and n % known == 0:
        sizes[sizes.index(-1)] = n // known
    if int(np.prod(sizes)) != n:
        wish = " × ".join(f"{a} {s}" for a, s in zip(AXES, sizes, strict=True))
        remedy = f"the others make {known}, which does not divide {n}" if -1 in sizes else "set one axis to -1"
        raise UserError(f"mesh: {wish} is not the {n} devices that there are; {remedy}")
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    if sizes[AXES.index(over)] % slices:
        raise UserError(
            f"mesh: {over} {sizes[AXES.index(over)]} does not divide over {slices} slices; set mesh.{over}={slices} or "
            "a multiple, or another mesh.over_slices"
        )
    from jax.experimental import mesh_utils

    if slices == 1 or rehearsed:
        if devices[0].platform != "tpu":
            return jax.make_mesh(tuple(sizes), AXES, devices=devices, axis_types=auto)
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(grid, AXES, axis_types=auto)
    outer = [slices if a == over else 1 for a in AXES]
    inner = [s // o for s, o in zip(sizes, outer, strict=True)]
    grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=auto)


def rules(config: MeshConfig) -> Rules:
    """The table of rules with the config's own in it.

    Raises:
      UserError: there is no such dimension of a weight, or no such axis of a mesh.

    >>> rules(MeshConfig(rules={"vocab": ["tensor", "fsdp"], "embed": None}))["vocab"]
    ('tensor', 'fsdp')
    """
    own: dict[str, tuple[str, ...]] = {}
    for name, axes in config.rules.items():
        if name not in RULES:
            raise UserError(f"mesh.rules: no weight has a dimension {name!r}{nearest(name, list(RULES))}")
        own[name] = (axes,) if isinstance(axes, str) else tuple(axes or ())
        for axis in own[name]:
            if axis not in AXES:
                raise UserError(f"mesh.rules.{name}: no mesh has an axis {axis!r}{nearest(axis, list(AXES))}")
        if len(set(own[name])) < len(own[name]):
            raise UserError(f"mesh.rules.{name}: {', '.join(own[name])} names an axis twice; name each once")
    return {**RULES, **own}


# --- batches ----------------------------------------------------------------------------------------------------------


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return int(np.prod([mesh.shape[a] for a in BATCH_AXES]))


def batch_sharding(mesh: jax.sharding.Mesh, lead: int = 0, column: str = "") -> NamedSharding:
    """The sharding of a batch column, after `lead` axes that are not split: rows, and of `…_BT…` also their length."""
    length = ("context",) if column.rpartition("_")[2].startswith("BT") else ()
    return NamedSharding(mesh, PartitionSpec(*(None,) * lead, BATCH_AXES, *length))


def check_length(mesh: jax.sharding.Mesh, length: int) -> None:
    """Raises: UserError: rows of so many tokens do not divide over the mesh."""
    if length % (n := mesh.shape["context"]):
        raise UserError(
            f"rows of {length} tokens do not divide over context {n}; set data.max_length to a multiple of {n}"
        )


def own_rows(mesh: jax.sharding.Mesh, micro: int, rows: int, process: int) -> frozenset[int]:
    """The rows of a batch, in `micro` micro-batches and filled up, that the devices of a process hold."""
    B = rows // micro
    filled = B + -B % batch_shards(mesh)
    where: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((filled,))
    held = {b for d, (s,) in where.items() if d.process_index == process for b in range(*s.indices(filled)) if b < B}
    return frozenset(a * B + b for a in range(micro) for b in held)


# --- weights and state ------------------------------------------------------------------------------------------------


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def spec(
    w: Weight,
    mesh: jax.sharding.Mesh,
    whole: Callable[[str, str], object] = lambda axis, remedy: None,
    table: Rules = RULES,
) -> PartitionSpec:
    """The mesh axes of one weight; those of size 1 are left out.

    Vectors are copied, of each stage's layers. So is a dimension that does not divide, and `whole` is told which, over
    what, and what would divide. An adapter's factor of less than 8 MiB a layer is not split over fsdp and context
    either: to gather each of many small ones takes longer than to keep them.
    """
    layers = w.value.shape[0] if w.stacked else 1
    small = "rank" in w.names and w.value.size * w.value.dtype.itemsize < _SMALL * layers
    vector = len(w.names) - int(w.stacked) == 1
    out: list[Any] = []
    used: set[str] = set()
    for i, (size, name) in enumerate(zip(w.value.shape, w.names, strict=True)):
        mine = () if vector and not (w.stacked and i == 0) else table[str(name)]
        axes = tuple(a for a in mine if mesh.shape[a] > 1 and a not in used and not (small and a in _GATHERED))
        while axes and size % (n := int(np.prod([mesh.shape[a] for a in axes]))):
            whole(f"{name} {size} over {' × '.join(axes)} {n}", _remedy(size, axes[-1], n, mesh))
            axes = axes[:-1]
        used |= set(axes)
        out.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*out) if any(out) or not vector else PartitionSpec()


def _remedy(size: int, axis: str, n: int, mesh: jax.sharding.Mesh) -> str:
    """The sizes of a mesh axis of these devices, near to its own, that would divide a dimension now split in `n`."""
    rest = n // mesh.shape[axis]
    fit = [d for d in range(2, size // rest + 1) if size % (rest * d) == 0 and mesh.size % d == 0]
    fit = sorted(fit, key=lambda d: (abs(d - mesh.shape[axis]), d))[:2]
    return f"{axis}={' or '.join(map(str, sorted(fit)))} divides" if fit else f"only {axis}=1 divides"


def shardings(weights: Any, mesh: jax.sharding.Mesh, warn: Callable[[str], None], table: Rules = RULES) -> Any:
    """A sharding for each `Weight` of a tree; dimensions that do not divide are named once."""
    odd: dict[str, str] = {}

    def one(path: tuple, w: Weight) -> NamedSharding:
        def whole(what: str, remedy: str) -> None:
            odd.setdefault(what, f"{path_name(path)}, …; {remedy}")

        return NamedSharding(mesh, spec(w, mesh, whole, table))

    tree = jax.tree_util.tree_map_with_path(one, weights, is_leaf=is_weight)
    if odd:
        warn(f"copied to all devices, because they do not divide: {'; '.join(f'{k} ({v})' for k, v in odd.items())}")
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
        where = p.sharding
        if s.shape != p.shape:
            where = NamedSharding(mesh, PartitionSpec(None, *where.spec[1:]))
        return where.with_memory_kind(HOST) if offload else where

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
