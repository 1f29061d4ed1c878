"""Tensors of files into sharded arrays: which tensor goes where, and reading each device's part by itself."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxtune import distributed
from jaxtune.errors import UserError
from jaxtune.hf import cache, files, layout, pickles, remote
from jaxtune.layers import Weight, is_weight, unbox
from jaxtune.weights import path_name

_ALIGNMENT = 64  # bytes
_READERS = 4  # weights that are read at the same time; each holds one host copy of a device's part


class Stored(Protocol):
    """A tensor in Hugging Face's layout that can be had when it is asked for."""

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def open(self) -> np.ndarray:
        """The tensor; as a view where that is possible, so that slicing it reads only the slice."""
        ...


class Grown:
    """A table with more rows than are stored: the others are the mean of those, as for new tokens one hopes."""

    def __init__(self, stored: Stored, rows: int) -> None:
        self.stored, self.dtype, self.shape = stored, stored.dtype, (rows, *stored.shape[1:])

    def open(self) -> np.ndarray:
        old = self.stored.open()
        mean = np.mean(old, 0, dtype=np.float32).astype(self.dtype)
        return np.concatenate([old, np.broadcast_to(mean, (self.shape[0] - len(old), *mean.shape))])


class Fresh:
    """A head's tensor that no file holds: normal with the standard deviation that transformers has, a bias zero."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, seed: int) -> None:
        self.shape, self.dtype, self.seed = shape, dtype, seed

    def open(self) -> np.ndarray:
        if len(self.shape) == 1:
            return np.zeros(self.shape, self.dtype)
        return (np.random.default_rng(self.seed).normal(size=self.shape) * 0.02).astype(self.dtype)


def with_head(tensors: Mapping[str, Stored], weights: Any, family: str, keep: bool, seed: int) -> dict[str, Stored]:
    """A folder's tensors with the head of `weights` instead of another: its own if `keep`, else a fresh one."""
    heads = {layout.HEAD, "score.weight", "score.bias", "qa_outputs.weight", "qa_outputs.bias"}
    own = {}
    for path, w in jax.tree_util.tree_leaves_with_path(weights, is_leaf=is_weight):
        name = layout.hf_names(path_name(path), w, family)[0]
        if name in heads:
            dtype = next(t.dtype for n, t in tensors.items() if n in (layout.EMBED, layout.HEAD))
            own[name] = tensors[name] if keep and name in tensors else Fresh(layout.hf_shape(w), dtype, seed)
    if layout.EMBED not in tensors and layout.HEAD in tensors:  # tied, and stored under the head's name
        own[layout.EMBED] = tensors[layout.HEAD]
    return {n: t for n, t in tensors.items() if n not in heads} | own


def read_folder(folder: Path, weights: Any = None, family: str = "llama") -> dict[str, Stored]:
    """The tensors of a model folder: safetensors, a cache, or pickles of torch that hold tensors alone.

    `weights` is its tree of abstract `Weight`s, which only a cache needs.

    Raises:
      UserError: there are none, a file is missing or damaged, or two hold the same tensor.
    """
    if (folder / cache.MARK).exists():
        return dict(cache.read(folder, weights, family))
    if (folder / remote.MARK).exists():
        from_store = remote.reader(folder)
        if (index := folder / files.INDEX).exists():
            return _read_shards(folder, index, from_store)
        return dict(from_store(folder / "model.safetensors"))
    read: Mapping[str, Callable[[Path], Mapping[str, Stored]]] = {
        "model.safetensors": files.read_header, "pytorch_model.bin": pickles.read,
    }  # fmt: skip
    for name, reader in read.items():
        if (index := folder / f"{name}.index.json").exists():
            return _read_shards(folder, index, reader)
        if (folder / name).exists():
            return dict(reader(folder / name))
    if any(folder.glob("consolidated.*.pth")):
        raise UserError(f"{folder}: is in Meta's format; `jaxtune convert {folder} DST` makes a model folder of it")
    raise UserError(
        f"{folder}: no model.safetensors, no {files.INDEX} and no pytorch_model.bin; is this a Hugging Face model "
        "folder?"
    )


def _read_shards(folder: Path, index: Path, reader: Callable[[Path], Mapping[str, Stored]]) -> dict[str, Stored]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(x, str) for pair in weight_map.items() for x in pair):
            raise TypeError("weight_map should map names to files")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{index}: the index is damaged ({e!r}); copy or download it again") from e
    tensors: dict[str, Stored] = {}
    for shard in sorted(set(weight_map.values())):
        held = reader(files.inside(folder, shard))
        if twice := sorted(set(held) & set(tensors)):
            raise UserError(f"{folder / shard}: holds {twice[0]}, which another shard holds too; copy the folder again")
        tensors.update(held)
    if missing := sorted(set(weight_map) - set(tensors)):
        raise UserError(f"{index}: names tensors that no shard holds: {', '.join(missing[:5])}")
    return tensors


def _aligned(sizes: Sequence[int], dtype: Any) -> np.ndarray:
    """An array that begins where the CPU backend wants it, so that it is taken as it is and not copied."""
    n = prod(sizes) * np.dtype(dtype).itemsize
    buffer = np.empty(n + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + n].view(dtype).reshape(sizes)


def _part(tensor: Stored, w: Weight, rest: tuple[slice, ...]) -> np.ndarray:
    """Slices of a tensor in our layout."""
    if isinstance(tensor, cache.Cached | remote.Remote):
        return tensor.part(w, rest)
    return layout.from_hf(tensor.open(), w)[rest]


def match(
    tensors: Mapping[str, Stored], weights: Any, family: str, tied: bool, place: str, stored_vocab: int | None = None
) -> dict[str, list[Stored]]:
    """Which tensors each weight is made of, by path, in the order of `layout.places`. Each is used exactly once.

    With `stored_vocab` the embedding table and the head have that many rows in the files, and grow to the weights'.

    Raises:
      UserError: one error that lists all unexpected, missing and mis-shaped names.
    """
    tensors = {n: t for n, t in tensors.items() if not layout.UNTRAINED.search(n)}
    if tied and layout.HEAD in tensors:  # a tied table may be stored under either name, or twice
        twin = tensors.pop(layout.HEAD)
        if layout.EMBED in tensors and not np.array_equal(tensors[layout.EMBED].open(), twin.open()):
            raise UserError(
                f"{place}: tie_word_embeddings is set, but {layout.HEAD} differs from {layout.EMBED}; set it to false "
                "in config.json"
            )
        tensors.setdefault(layout.EMBED, twin)
    found: dict[str, list[Stored]] = {}
    missing, shapes = [], []
    for path, w in jax.tree_util.tree_leaves_with_path(weights, is_leaf=is_weight):
        found[path_name(path)] = own = []
        wanted = layout.hf_shape(w)
        in_file = (stored_vocab, *wanted[1:]) if stored_vocab and "vocab" in w.names else wanted
        for name in layout.hf_names(path_name(path), w, family):
            if (t := tensors.pop(name, None)) is None:
                missing.append(name)
                continue
            if t.shape == wanted:
                own.append(t)
            elif (
                t.shape[1:] == wanted[1:]
                and "vocab" in w.names
                and stored_vocab
                and stored_vocab <= t.shape[0] <= wanted[0]
            ):
                own.append(Grown(t, wanted[0]))
            else:
                shapes.append(f"{name} {list(t.shape)}, config wants {list(in_file)}")
    faults = [
        f"{title}: {', '.join(names[:20])}{f' and {len(names) - 20} more' if len(names) > 20 else ''}"
        for title, names in (("missing", missing), ("unexpected", sorted(tensors)), ("mis-shaped", shapes))
        if names
    ]
    if faults:
        raise UserError(f"{place}: tensors do not fit config.json; {'; '.join(faults)}")
    return found


class Held(NamedTuple):
    """How a weight is held, where that is not as it is read."""

    change: Callable[[Weight], Any]  # makes a node of `Weight`s
    form: Any  # the node's abstract arrays
    place: Any  # and shardings


def load(
    found: Mapping[str, list[Stored]], weights: Any, shardings: Any, family: str, held: Mapping[str, Held] | None = None
) -> Any:
    """Read weights into sharded arrays of the dtypes of `weights`; each device's part is read by itself.

    `weights` is a tree of `Weight`s with abstract values, `shardings` one of its form. A few are read at a time. Those
    of `held`, by path, are changed layer by layer as they come, so that no more than a layer's is there as it was read.

    Raises:
      UserError: a tensor holds NaN or infinity.
    """

    def one(path: tuple, w: Any, sharding: Any) -> Any:
        name = path_name(path)
        names, tensors = layout.hf_names(name, w, family), found[name]
        if held is None or name not in held:
            return w.like(_read(names, tensors, w, sharding))
        return _read_changed(names, tensors, w, sharding, held[name])

    leaves, tree = jax.tree_util.tree_flatten_with_path(weights, is_leaf=is_weight)
    paths, boxes = zip(*leaves, strict=True)
    # processes have to run what changes weights in the same order
    with ThreadPoolExecutor(1 if held and distributed.count() > 1 else _READERS) as pool:
        return jax.tree.unflatten(tree, pool.map(one, paths, boxes, jax.tree.leaves(shardings)))


def _read(names: Sequence[str], tensors: Sequence[Stored], w: Weight, sharding: jax.sharding.Sharding) -> jax.Array:
    """The array of one weight of the tensors that it is made of."""
    axes = tuple(w.names.index(n) for n in layout.apart(w))
    grid = np.arange(len(tensors)).reshape([w.value.shape[a] for a in axes])

    def read(index: Any) -> np.ndarray:
        which = grid[tuple(index[a] for a in axes)]
        rest = tuple(s for a, s in enumerate(index) if a not in axes)
        sizes = [len(range(*s.indices(n))) for s, n in zip(index, w.value.shape, strict=True)]
        out = _aligned(sizes, w.value.dtype)
        by_tensor = np.moveaxis(out, axes, range(len(axes)))
        for at in np.ndindex(which.shape):
            part = _part(tensors[which[at]], w, rest)
            by_tensor[at] = part
            if not files.finite(part):
                raise UserError(
                    f"{names[which[at]]}: holds NaN or infinity; the checkpoint is damaged, copy or download it again"
                )
        return out

    return jax.make_array_from_callback(w.value.shape, sharding, read)


def _read_changed(names: Sequence[str], tensors: Sequence[Stored], w: Weight, sharding: Any, held: Held) -> Any:
    """The same in another form. Each layer is read, changed, and put where it belongs."""
    count = w.value.shape[0] if w.stacked else 1
    layer = w
    if w.stacked:
        value = jax.ShapeDtypeStruct(w.value.shape[1:], w.value.dtype)
        layer = w.replace(names=w.names[1:], value=value)
        spec = (*sharding.spec, *(None,) * len(w.names))[1 : len(w.names)]
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=held.place)
    def put(whole: Any, x: jax.Array, i: jax.Array) -> Any:
        new = unbox(held.change(layer.like(x)))
        return jax.tree.map(lambda a, b: a.at[i].set(b), whole, new) if w.stacked else new

    whole = jax.jit(
        lambda: jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), held.form), out_shardings=held.place
    )()
    each = len(tensors) // count
    for i in range(count):
        mine = slice(i * each, (i + 1) * each)
        whole = put(whole, _read(names[mine], tensors[mine], layer, sharding), i)
    return jax.tree.map(lambda box, x: box.like(x), held.change(w), whole, is_leaf=is_weight)
