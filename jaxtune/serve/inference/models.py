"""The models that are held: bases read once, adapters put upon them, the least used let go where memory runs out."""

import collections
import dataclasses
import math
import threading
from pathlib import Path
from typing import Any

import jax

from jaxtune import config, job, log, sharding, tuned
from jaxtune.errors import UserError
from jaxtune.hf import adapters, soft_prompts
from jaxtune.layers import is_weight
from jaxtune.serve.inference.asks import Failure
from jaxtune.serve.inference.batch import Batch
from jaxtune.serve.inference.words import Speller
from jaxtune.tuned import Shared, Tuned

Key = tuple[str, str | None]  # folders of a base and of an adapter
_PARENTS = 4  # folders above a model in which its run's config may lie
_ROWS = 4  # of the budget, the part that is for the keys and values of one model's rows


class Held:
    """A model in memory."""

    def __init__(self, key: Key, shared: Shared, model: Tuned, size: int, room: int) -> None:
        self.key, self.shared, self.tuned, self.size = key, shared, model, size
        self.uses = 0
        with jax.set_mesh(model.mesh):
            self.batch = Batch(model.generator, room)
        self.speller = Speller(model.tokenizer)


class Models:
    """Models by their folders, `budget` bytes of them. For several threads."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.held: collections.OrderedDict[Key, Held] = collections.OrderedDict()  # least used first
        self.lock = threading.Lock()
        self.loading = threading.Lock()  # one at a time
        self.gone: set[Key] = set()  # to be let go when they are free
        job.use_compile_cache()
        self.mesh = sharding.make_mesh(config.Mesh())
        self.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"

    def acquire(self, base: str, adapter: str | None) -> Held:
        """A model, to be released after use.

        Raises:
          Failure: it cannot be opened, is larger than the budget, or what is in use leaves it no room.
        """
        key = (base, adapter)
        if (found := self._found(key)) is not None:
            return found
        with self.loading:
            if (found := self._found(key)) is not None:
                return found
            try:
                return self._load(key)
            except UserError as e:
                log.warn(f"{adapter or base}: {e}")  # it may name folders, which are not the client's business
                raise Failure(500, "the model cannot be opened; the service's log says why", "model_damaged") from e

    def release(self, held: Held) -> None:
        """A model is no more in use by someone."""
        with self.lock:
            held.uses -= 1
            self._sweep()

    def forget(self, folder: str) -> None:
        """Let go of what was read from a folder, once it is free."""
        with self.lock:
            self.gone |= {key for key in self.held if any(f and Path(f).is_relative_to(folder) for f in key)}
            self._sweep()

    def _found(self, key: Key) -> Held | None:
        with self.lock:
            if (held := self.held.get(key)) is None or key in self.gone:
                return None
            for k in (key, (key[0], None)):  # a base is used as late as its adapters
                if k in self.held:
                    self.held.move_to_end(k)
            held.uses += 1
            return held

    def _load(self, key: Key) -> Held:
        base, adapter = key
        with self.lock:
            if key in self.gone:
                self._sweep()
                if key in self.held:
                    raise Failure(503, "this model is being deleted; try again later")
        if adapter is None:
            with jax.set_mesh(self.mesh):
                plain = tuned.draw(Path(base), None, self.mesh, self.dtype)
            size = _bytes(plain.weights)
            self._make_room(size)
            shared = tuned.share(Path(base), self.mesh, self.dtype)
            return self._keep(key, shared, shared.alone(), size)
        under = self.acquire_base(base)
        try:
            read = soft_prompts.open_adapter(Path(adapter))
            shared, model, size = self._under(under, read)
            return self._keep(key, shared, model, size)
        finally:
            self.release(under)

    def acquire_base(self, base: str) -> Held:
        """The base of an adapter that is being read."""
        return self._found((base, None)) or self._load((base, None))

    def _under(self, under: Held, read: adapters.Adapter | soft_prompts.SoftPrompts) -> tuple[Shared, Tuned, int]:
        """A base under an adapter, and the bytes that it brings."""
        shared = under.shared
        c = shared.blueprint.decoder
        with jax.set_mesh(self.mesh):
            b = tuned.draw(shared.blueprint.folder, read, self.mesh, self.dtype, None)
            if jax.default_backend() != "cpu" and b.decoder.groups != c.groups:
                log.warn("an adapter is not alike in all layers: its base is read again for it")
                self._make_room(_bytes(b.weights))
                shared = tuned.share(shared.blueprint.folder, self.mesh, self.dtype, b.decoder.groups)
                return shared, shared.under(read), _bytes(b.weights)
        self._make_room(0)
        model = shared.under(read)
        had = {id(x) for x in jax.tree.leaves(under.tuned.weights)}
        return shared, model, sum(x.nbytes for x in jax.tree.leaves(model.weights) if id(x) not in had)

    def _keep(self, key: Key, shared: Shared, model: Tuned, size: int) -> Held:
        if (head := model.blueprint.decoder.task) is not None:
            raise Failure(400, f"the model has a head for {head.kind} and says no text", "model_not_supported", "model")
        held = Held(key, shared, _as_trained(model, Path(key[1] or key[0])), size, self.budget // _ROWS)
        held.uses = 1
        with self.lock:
            self._evict(size)
            self.held[key] = held
        return held

    def _make_room(self, size: int) -> None:
        with self.lock:
            self._evict(size)

    def _evict(self, size: int) -> None:
        """Let go of the least used until so many bytes have room."""
        if size > self.budget:
            raise Failure(
                400,
                f"the model takes {log.size(size)}, the service holds {log.size(self.budget)}; its operator may raise "
                "cache_bytes",
                "model_too_large",
                "model",
            )
        while sum(h.size for h in self.held.values()) + size > self.budget:
            free = next((k for k in self.held if self._free(k)), None)
            if free is None:
                raise Failure(503, "all models that are held are in use; try again later", "models_in_use")
            del self.held[free]

    def _free(self, key: Key) -> bool:
        return not self.held[key].uses and (key[1] is not None or not any(k[0] == key[0] and k[1] for k in self.held))

    def _sweep(self) -> None:
        for key in sorted(self.gone, key=lambda k: k[1] is None):  # adapters before their base
            if key in self.held and self._free(key):
                del self.held[key]
        self.gone &= self.held.keys()


def _bytes(weights: Any) -> int:
    leaves = (w.value for w in jax.tree.leaves(weights, is_leaf=is_weight))
    return sum(math.prod(x.shape) * x.dtype.itemsize for leaf in leaves for x in jax.tree.leaves(leaf))


def _as_trained(model: Tuned, folder: Path) -> Tuned:
    """With the system message and the thinking that its run was trained with."""
    for place in [folder, *folder.parents][:_PARENTS]:
        if (file := place / job.CONFIG).is_file() and (place / "metrics.jsonl").is_file():
            data = config.load(file).data
            return dataclasses.replace(model, thinking=data.thinking, system=data.system)
    return model
