"""The processes of a run: one on a laptop, one for each host of a slice. They start, agree and end together.

Each process runs the same program (JAX's multi-controller runtime) and speaks to the others in two ways: arrays over
the devices, and small texts through the coordinator's key-value store, as at the comparison at the start. `watch` has
them watch over each other.

Dimensions: N devices.
"""

import inspect
import itertools
import json
import os
import socket
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxtune import log
from jaxtune.errors import UserError

STOP, SAVE = 1, 2  # bits of a wish
_HEARTBEAT_S, _INIT_S = 100, 300
_PREPARING_MS = 3_600_000  # hosts may tokenise at different speeds; a lost one is found before
TURNS = itertools.count()  # of keys in the store, which are written once: all processes count alike
# Variables by which `jax.distributed.initialize` finds the others by itself; the second ones hold lists.
_CLUSTERS = ("MEGASCALE_COORDINATOR_ADDRESS", "SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri")
_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")


# --- who there is -----------------------------------------------------------------------------------------------------


def initialize() -> None:
    """Join the other processes, before any other use of JAX; nothing where there are none.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say where they are; on a TPU slice, under SLURM and
    under Open MPI JAX finds them.

    Raises:
      UserError: the variables are incomplete, or the others cannot be reached.
    """
    if jax.distributed.is_initialized():
        return _hush()
    given: dict[str, Any] = {}
    if (address := os.environ.get("JAX_COORDINATOR_ADDRESS")) is not None:
        try:
            given = {
                "coordinator_address": address,
                "num_processes": int(os.environ["JAX_NUM_PROCESSES"]),
                "process_id": int(os.environ["JAX_PROCESS_ID"]),
            }
        except (KeyError, ValueError) as e:
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS={address} is set, and {e} is not right; set JAX_NUM_PROCESSES and "
                "JAX_PROCESS_ID to whole numbers"
            ) from e
    elif not _in_cluster():
        return
    if "jax_enable_preemption_service" in jax.config.values:  # it would take SIGTERM from Python's own handler
        jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    wanted: dict[str, Any] = {
        "initialization_timeout": int(seconds("JAXTUNE_INIT_TIMEOUT", _INIT_S)),
        "heartbeat_timeout_seconds": int(seconds("JAXTUNE_HEARTBEAT_TIMEOUT", _HEARTBEAT_S)),
        "shutdown_timeout_seconds": 30,  # of a process that ended by itself
    }
    known = inspect.signature(jax.distributed.initialize).parameters
    try:
        jax.distributed.initialize(**given, **{k: v for k, v in wanted.items() if k in known})
    except (RuntimeError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"the other processes cannot be joined ({reason}); look at the coordinator's address") from e
    _hush()


def _hush() -> None:
    if members()[0] != 0:
        log.hush()


def _in_cluster() -> bool:
    """Whether JAX would find several processes by itself."""
    if any(os.environ.get(name) for name in _CLUSTERS) or any("," in os.environ.get(name, "") for name in _HOSTS):
        return True
    platforms = jax.config.jax_platforms or "tpu"  # type: ignore[attr-defined]
    if "tpu" not in platforms or any(name in os.environ for name in (*_HOSTS, "TPU_SKIP_MDS_QUERY")):
        return False
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster  # no public way to ask beforehand

    try:
        return GceTpuCluster.is_env_present() and GceTpuCluster.get_process_count() > 1
    except OSError:  # no metadata server, as on Colab
        return False


def members() -> tuple[int, int]:
    """Which process this is to the coordinator, and how many it has: known before any device is."""
    from jax._src import distributed  # the public part does not say

    state = distributed.global_state
    return (state.process_id, state.num_processes) if state.client is not None else (0, 1)


def index() -> int:
    """Which process this is, from 0."""
    return jax.process_index()


def count() -> int:
    """How many there are."""
    return jax.process_count()


def first() -> bool:
    """Whether this is the process that speaks and writes for all."""
    return index() == 0


# --- arrays -----------------------------------------------------------------------------------------------------------


def put(x: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    """An array of which each process has at least its own part, on the devices."""
    if where.is_fully_addressable:
        return jax.device_put(x, where)
    return jax.make_array_from_callback(x.shape, where, lambda i: x[i])


def wishes(mesh: jax.sharding.Mesh, bits: int) -> jax.Array:
    """This process's wish on each of its devices, int32 `[N]`: a step takes the maximum of each bit over all."""
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    return put(np.full(mesh.size, bits, np.int32), where)


def gathered(tree: Any) -> Any:
    """Arrays as whole ones in the memory of the first process, a layer at a time; None in their places elsewhere.

    All processes have to call this with the same tree.
    """
    speaks = first()

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array):  # abstract
            return x
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x) if speaks else None
        copied = jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec())  # type: ignore[attr-defined]
        if x.ndim < 3:
            all_of = jax.jit(lambda x: x, out_shardings=copied)(x)
            return np.asarray(all_of) if speaks else None
        layer = jax.jit(lambda x, i: x[i], out_shardings=copied)
        out = np.empty(x.shape, x.dtype) if speaks else None
        for i in range(x.shape[0]):  # stacked layers: not all of them fit one device
            found = layer(x, i)
            if out is not None:
                out[i] = np.asarray(found)
        return out

    return jax.tree.map(whole, tree)


def wait(name: str) -> None:
    """Until every process is here."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def everywhere(true: bool) -> bool:
    """Whether it is true on all processes. All of them call this."""
    if count() == 1:
        return true
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.array(true))))


# --- small texts ------------------------------------------------------------------------------------------------------


def store() -> Any:
    """The coordinator's key-value store."""
    from jax._src import distributed  # the public part has no key-value store

    return distributed.global_state.client


def agree(what: str, mine: Mapping[str, Any]) -> None:
    """Compare values, as JSON holds them, with those of the first process. All processes call this.

    Raises:
      UserError: in every process: some differ. Names them and the host.
    """
    if count() == 1:
        return
    kv, ms = store(), _PREPARING_MS
    key = f"jaxtune/{next(TURNS)}/{what}"
    kv.key_value_set(f"{key}/{index()}", json.dumps([socket.gethostname(), mine]))
    if first():
        verdict = ""
        for i in range(1, count()):
            host, theirs = json.loads(kv.blocking_key_value_get(f"{key}/{i}", ms))
            if odd := differing(json.loads(json.dumps(mine)), theirs):
                verdict = f"process {i} on {host} differs from process 0 in {', '.join(odd)}; make them the same"
                break
        kv.key_value_set(f"{key}/verdict", verdict)
    if verdict := kv.blocking_key_value_get(f"{key}/verdict", ms):
        raise UserError(verdict)


def from_first(text: str) -> str:
    """The text that the first process gives, in all of them. All processes call this."""
    if count() == 1:
        return text
    key = f"jaxtune/{next(TURNS)}/text"
    if first():
        store().key_value_set(key, text)
    return store().blocking_key_value_get(key, _PREPARING_MS)


def differing(first: Any, other: Any, name: str = "") -> list[str]:
    """Where two trees of JSON differ.

    >>> differing({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    ['b.c (2 there, 3 here)']
    """
    if isinstance(first, Mapping) and isinstance(other, Mapping):
        keys = sorted({*first, *other})
        return [d for k in keys for d in differing(first.get(k), other.get(k), f"{name}.{k}" if name else k)]
    return [] if first == other else [f"{name} ({first} there, {other} here)"]


def seconds(variable: str, usual: float) -> float:
    """A duration that an environment variable may give."""
    return float(os.environ.get(variable) or usual)
