"""The processes of a run: one on a laptop, one for each host of a slice. They start, agree, watch and end together.

Each process runs the same program (JAX's multi-controller runtime) and speaks to the others in two ways: arrays over
the devices, and small texts through the coordinator's key-value store. Of the second kind are the comparison at the
start, signs of life, and the reasons of failures.

Dimensions: N devices.
"""

import contextlib
import inspect
import itertools
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from jaxtune import log
from jaxtune.errors import Interrupted, UserError

STOP, SAVE = 1, 2  # bits of a wish
RESUME_ME = 75  # EX_TEMPFAIL of sysexits.h: run the same command again
_LOST_S, _HEARTBEAT_S, _INIT_S = 60.0, 100, 300
_STEP_S, _STEPS = 60.0, 20  # a step is hung after so many seconds, or so many times the usual
_PREPARING_MS = 3_600_000  # hosts may tokenise at different speeds; a lost one is found before
_FIRST_STEP_S = 600.0  # hosts read weights at different speeds
_TURNS = itertools.count()  # of keys in the store, which are written once: all processes count alike
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
        "initialization_timeout": int(_seconds("JAXTUNE_INIT_TIMEOUT", _INIT_S)),
        "heartbeat_timeout_seconds": int(_seconds("JAXTUNE_HEARTBEAT_TIMEOUT", _HEARTBEAT_S)),
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
    if _members()[0] != 0:
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


def _members() -> tuple[int, int]:
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


def _store() -> Any:
    from jax._src import distributed  # the public part has no key-value store

    return distributed.global_state.client


def agree(what: str, mine: Mapping[str, Any]) -> None:
    """Compare values, as JSON holds them, with those of the first process. All processes call this.

    Raises:
      UserError: in every process: some differ. Names them and the host.
    """
    if count() == 1:
        return
    store, ms = _store(), _PREPARING_MS
    key = f"jaxtune/{next(_TURNS)}/{what}"
    store.key_value_set(f"{key}/{index()}", json.dumps([socket.gethostname(), mine]))
    if first():
        verdict = ""
        for i in range(1, count()):
            host, theirs = json.loads(store.blocking_key_value_get(f"{key}/{i}", ms))
            if odd := differing(json.loads(json.dumps(mine)), theirs):
                verdict = f"process {i} on {host} differs from process 0 in {', '.join(odd)}; make them the same"
                break
        store.key_value_set(f"{key}/verdict", verdict)
    if verdict := store.blocking_key_value_get(f"{key}/verdict", ms):
        raise UserError(verdict)


def from_first(text: str) -> str:
    """The text that the first process gives, in all of them. All processes call this."""
    if count() == 1:
        return text
    key = f"jaxtune/{next(_TURNS)}/text"
    if first():
        _store().key_value_set(key, text)
    return _store().blocking_key_value_get(key, _PREPARING_MS)


def differing(first: Any, other: Any, name: str = "") -> list[str]:
    """Where two trees of JSON differ.

    >>> differing({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    ['b.c (2 there, 3 here)']
    """
    if isinstance(first, Mapping) and isinstance(other, Mapping):
        keys = sorted({*first, *other})
        return [d for k in keys for d in differing(first.get(k), other.get(k), f"{name}.{k}" if name else k)]
    return [] if first == other else [f"{name} ({first} there, {other} here)"]


# --- watching over each other -----------------------------------------------------------------------------------------


class Watch:
    """Ends this process with code 75, and says which host is to blame, when another is lost, hung or has failed.

    Every process writes signs of life: a beat, and the number of steps that it has begun. A process whose beat stands
    still is lost. Where a step that this process has begun is not done in time, those that have begun fewer are hung,
    unless they still compile it.
    """

    def __init__(self) -> None:
        self._lost_after = _seconds("JAXTUNE_LOST_AFTER", _LOST_S)
        self._step_limit = _seconds("JAXTUNE_STEP_TIMEOUT", 0.0)
        self._lock = threading.Lock()
        (self._me, self._count), self._key = _members(), f"jaxtune/{next(_TURNS)}"
        self._begun, self._since, self._report, self._pending = 0, 0.0, None, False
        self._preparing = False
        self._times: deque[float] = deque(maxlen=_STEPS)
        self._closed = threading.Event()
        self._life: dict[int, Any] = {}
        self._asked = time.monotonic()
        others = (i for i in range(self._count) if i != self._me)
        self._beats = dict.fromkeys(others, (0, self._asked))  # the last beat of each, and when it was new
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._speak, self._look)]

    def over(self, step: Callable[..., Any], prepare: Callable[..., Any] = lambda *args: None) -> Callable[..., Any]:
        """A training step that is watched: until its report is there it is not done.

        `prepare` is called before it and may take its time, as compiling does: the step has then not begun.
        """

        def watched(*args: Any) -> Any:
            self._preparing = True
            prepare(*args)
            now = time.monotonic()
            if self._begun:
                self._times.append(now - self._since)
            with self._lock:
                self._begun, self._since, self._report, self._pending = self._begun + 1, now, None, True
            self._preparing = False
            state, report = step(*args)
            self._report = report["loss"]
            return state, report

        return watched

    def _settle(self) -> None:
        """Look whether the last step is done."""
        with self._lock:
            if self._report is not None and self._report.is_ready():
                self._pending = False

    def start(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # no coordinator: `_look` sees how long
            self._write()
        for t in self._threads:
            t.start()

    def stop(self, failure: str | None = None) -> None:
        """This process ends: all is done, or why not."""
        self._closed.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator is no more
            self._write(done=True, failure=failure)

    def _write(self, **more: Any) -> None:
        beat = time.monotonic_ns()
        life = {"beat": beat, "begun": self._begun, "preparing": self._preparing, "host": socket.gethostname(), **more}
        _store().key_value_set(f"{self._key}/life/{self._me}", json.dumps(life), allow_overwrite=True)

    def _speak(self) -> None:
        while not self._closed.wait(self._lost_after / 10):
            try:
                self._write()
                lives = dict(_store().key_value_dir_get(f"{self._key}/life"))
            except jax.errors.JaxRuntimeError:  # the coordinator does not answer: `_look` sees how long
                continue
            self._life = {int(k.rsplit("/", 1)[-1]): json.loads(v) for k, v in lives.items()}
            self._asked = time.monotonic()

    def _look(self) -> None:
        while not self._closed.wait(self._lost_after / 10):
            if (blame := self._to_blame()) is not None and not self._closed.is_set():
                print(f"stopped: {blame}; run the same command again on all hosts", file=sys.stderr, flush=True)
                self.stop(blame)
                self.leave(RESUME_ME)  # the main thread may wait for the lost one for ever

    def leave(self, code: int) -> NoReturn:
        """End this process at once: at JAX's own end all wait for each other, and not all will come.

        The coordinator ends last, or the others could not say why they end; it waits for those that live.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _store().key_value_set(f"{self._key}/left/{self._me}", "")
            began = time.monotonic()
            living = {i for i, (_, since) in self._beats.items() if began - since < self._lost_after}
            while self._me == 0 and living and time.monotonic() - began < self._lost_after:
                time.sleep(0.1)
                living -= {int(k.rsplit("/", 1)[-1]) for k, _ in _store().key_value_dir_get(f"{self._key}/left")}
        os._exit(code)

    def _to_blame(self) -> str | None:
        """Who is lost, hung or has failed, in words."""
        now = time.monotonic()
        if now - self._asked > self._lost_after:
            return f"process 0, the coordinator, has not answered for {now - self._asked:.0f} s"
        lives = {i: life for i, life in self._life.items() if i != self._me}
        for i, (beat, since) in list(self._beats.items()):
            life = lives.get(i, {"beat": beat, "host": "a host that never spoke"})
            who = f"process {i} on {life['host']}"
            if life["beat"] != beat:
                self._beats[i] = life["beat"], (since := now)
            quiet = now - since
            if life.get("failure") and quiet > self._lost_after / 5:  # time for this one to fail by itself
                return f"{who} has failed: {life['failure']}"
            if not life.get("done") and quiet > self._lost_after:
                return f"{who} is lost: no sign of life for {quiet:.0f} s"
        self._settle()
        if any(life["preparing"] and life["begun"] < self._begun for life in lives.values()):
            self._since = now  # it compiles: the step waits for it, and the time for it begins anew
        if not self._pending or (waited := now - self._since) < self._limit():
            return None
        behind = [i for i, life in lives.items() if life["begun"] < self._begun and not life.get("done")]
        names = ", ".join(f"process {i} on {lives[i]['host']}" for i in behind)
        if not names:
            return f"a step is not done after {waited:.0f} s, though all processes have begun it; a device may hang"
        return f"a step is not done after {waited:.0f} s: {names} has not begun it"

    def _limit(self) -> float:
        """Seconds until a step counts as hung."""
        usual = max(_STEP_S, _STEPS * statistics.median(self._times)) if self._times else _FIRST_STEP_S
        return self._step_limit or usual

    def join(self) -> None:
        """Wait for the verdict on a failure that is likely another's."""
        self._threads[1].join(2 * self._lost_after)


_open: Watch | None = None
_failed: Watch | None = None


@contextlib.contextmanager
def watching() -> Iterator[Callable[..., Callable[..., Any]]]:
    """While open, processes watch over each other; gives what makes a training step a watched one (`Watch.over`).

    An error in one ends the others, and `leave` ends that one. A failure of a collective operation waits until it is
    known who is lost. Within another such context it is that one.
    """
    global _open, _failed
    if _open is not None or _members()[1] == 1:
        yield _open.over if _open is not None else lambda step, prepare=None: step
        return
    watch, _failed = Watch(), None
    _open = watch
    watch.start()
    try:
        yield watch.over
    except Interrupted:  # in all of them, at the same step
        watch.stop()
        raise
    except BaseException as e:
        if isinstance(e, jax.errors.JaxRuntimeError):
            watch.join()
        _failed = watch
        watch.stop(" ".join(str(e).split())[:300] or type(e).__name__)
        raise
    finally:
        _open = None
    watch.stop()


def failed() -> bool:
    """Whether there are other processes, and an error ended `watching`, which they may not share."""
    return _failed is not None


def leave(code: int) -> NoReturn:
    """End this process with a code, after such an error."""
    assert _failed is not None
    _failed.leave(code)


def _seconds(variable: str, usual: float) -> float:
    return float(os.environ.get(variable) or usual)
