"""A model folder whose weights are Orbax checkpoints, in our layout: what a big model starts from in seconds.

Beside `config.json` and the tokenizer's files lie `weights/<layer>/`, one checkpoint for each layer and for what is
outside of them, and `weights.json`, which names the Hugging Face tensors that they are made of, so that the way back
is exact. Orbax stores arrays in chunks (zarr in OCDBT, https://google.github.io/tensorstore), of which a device reads
those that its part lies in.
"""

import functools
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.errors import UserError
from jaxtune.hf import files, layout
from jaxtune.layers import Weight, is_weight, plain_names
from jaxtune.weights import path_name

MARK, WEIGHTS = "weights.json", "weights"
_CHUNK_BYTES = 2**26
_POOL_BYTES = 2**28  # of decoded chunks, for tensors that share one


class Cached:
    """A Hugging Face tensor in a cache."""

    def __init__(self, folder: Path, plain: str, w: Weight, at: Mapping[str, int], dtype: np.dtype) -> None:
        self.dtype, self.shape = dtype, layout.hf_shape(w)
        self._folder, self._plain, self._w, self._at = folder, plain, w, at

    def part(self, w: Weight, rest: tuple[slice, ...]) -> np.ndarray:
        """Slices of the tensor in our layout; only their chunks are read."""
        slices = iter(rest)
        names = [str(n) for n in self._w.names if n != "layers"]
        index = tuple(self._at[n] if n in self._at else next(slices) for n in names)
        place = self._folder / WEIGHTS / _unit(self._plain)
        return _array(place, _key(self._plain), bool(self._at))[index].read().result()

    def open(self) -> np.ndarray:
        whole = (slice(None),) * (len(self._w.names) - len(layout.apart(self._w)))
        return layout.to_hf(self.part(self._w, whole), self._w)


@functools.cache
def _context(pool: bool) -> Any:
    import tensorstore as ts

    return ts.Context({"cache_pool": {"total_bytes_limit": _POOL_BYTES if pool else 0}})


@functools.lru_cache(1024)
def _array(checkpoint: Path, key: str, pool: bool) -> Any:
    import tensorstore as ts

    store = {"driver": "ocdbt", "base": checkpoint.resolve().as_uri(), "path": f"{key}/"}
    try:
        return ts.open({"driver": "zarr", "kvstore": store}, open=True, read=True, context=_context(pool)).result()
    except (ValueError, OSError) as e:
        reason = " ".join(str(e).split())[:160]
        raise UserError(f"{checkpoint}: {key} cannot be read ({reason}); convert the model again") from e


def _unit(plain: str) -> str:
    """The checkpoint that a weight lies in."""
    first, *rest = plain.split("/")
    return f"layers.{rest[0]}" if first == "layers" else first


def _key(plain: str) -> str:
    return plain.replace("/", ".")


def write(
    folder: Path, tensors: Mapping[str, files.Entry], weights: Any, family: str, said: Callable[[int], None]
) -> None:
    """Write the Hugging Face tensors of a model as a cache; checkpoints that are there already are left.

    `weights` is its tree of abstract `Weight`s. `said` is told how many bytes were written.
    """
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    units: dict[str, dict[str, tuple[Weight, list[str]]]] = {}
    for path, w in jax.tree_util.tree_leaves_with_path(weights, is_leaf=is_weight):
        plains, names = plain_names(path_name(path)), layout.hf_names(path_name(path), w, family)
        each = len(names) // len(plains)
        for i, plain in enumerate(plains):
            units.setdefault(_unit(plain), {})[plain] = w, names[i * each : (i + 1) * each]
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    for unit, parts in units.items():
        target = folder / WEIGHTS / unit
        held = sum(tensors[n].nbytes for _, names in parts.values() for n in _present(names, tensors))
        if not target.is_dir():  # Orbax renames it when it is whole
            for half in target.parent.glob(f"{unit}.orbax-checkpoint-tmp*"):
                shutil.rmtree(half)
            arrays = {_key(plain): _assemble(w, names, tensors) for plain, (w, names) in parts.items()}
            options = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in arrays}
            try:
                checkpointer.save(target.resolve(), args=ocp.args.PyTreeSave(arrays, save_args=options))
            except ValueError as e:  # tensorstore reports a full disk so
                raise OSError(" ".join(str(e).split())[:200]) from e
        said(held)
    listed = {n: [files.NAMES[t.dtype], list(t.shape)] for n, t in tensors.items() if not layout.UNTRAINED.search(n)}
    (folder / MARK).write_text(json.dumps({"format": 1, "tensors": listed}, indent=1) + "\n")


def _present(names: list[str], tensors: Mapping[str, files.Entry]) -> list[str]:
    """The names under which a weight is there: a tied table may be stored as the head alone."""
    return [n if n in tensors else layout.HEAD for n in names]


def _assemble(w: Weight, names: list[str], tensors: Mapping[str, files.Entry]) -> np.ndarray:
    """One layer's array of its tensors."""
    entries = [tensors[n] for n in _present(names, tensors)]
    if len({e.dtype for e in entries}) > 1:
        raise UserError(f"{names[0]}: its experts have different dtypes; give one with --dtype")
    sizes = {str(n): s for n, s in zip(w.names, w.value.shape, strict=True) if n != "layers"}
    axes = [a for a in layout.apart(w) if a != "layers"]
    if not axes:
        data = files.checked(names[0], entries[0])
        return layout.from_hf(data, w)
    out = np.empty(tuple(sizes.values()), entries[0].dtype)
    by_tensor = np.moveaxis(out, [list(sizes).index(a) for a in axes], range(len(axes)))
    for at, name, entry in zip(np.ndindex(*by_tensor.shape[: len(axes)]), names, entries, strict=True):
        by_tensor[at] = layout.from_hf(files.checked(name, entry), w)
    return out


def read(folder: Path, weights: Any, family: str) -> dict[str, Cached]:
    """The Hugging Face tensors of a cache, of a tree of abstract `Weight`s; nothing is read yet.

    Raises:
      UserError: the list of its tensors is damaged.
    """
    try:
        listed = json.loads((folder / MARK).read_text())["tensors"]
        dtypes = {n: files.DTYPES[dtype] for n, (dtype, _) in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{folder / MARK}: is damaged ({e!r}); convert the model again") from e
    out: dict[str, Cached] = {}
    for path, w in jax.tree_util.tree_leaves_with_path(weights, is_leaf=is_weight):
        plains, names = plain_names(path_name(path)), layout.hf_names(path_name(path), w, family)
        for i, (name, at) in enumerate(zip(names, layout.places(w), strict=True)):
            plain, here = plains[i // (len(names) // len(plains))], {k: v for k, v in at.items() if k != "layers"}
            if name in dtypes:
                out[name] = Cached(folder, plain, w, here, dtypes[name])
            if name == layout.EMBED and layout.HEAD in dtypes:  # tied, unless there is a head to overwrite it
                out[layout.HEAD] = Cached(folder, plain, w, here, dtypes[layout.HEAD])
    return out
