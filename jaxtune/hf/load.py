"""Tensors of files into sharded arrays: which tensor goes where, and reading each device's part by itself."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np

from jaxtune.errors import UserError
from jaxtune.hf import layout
from jaxtune.layers import is_weight
from jaxtune.weights import path_name

_READERS = 4  # weights that are read at the same time; each holds one host copy of a device's part
_EXPONENTS = {2: {"float16": 0x7C00, "bfloat16": 0x7F80}, 4: {"float32": 0x7F800000}}


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
            elif t.shape[1:] == wanted[1:] and "vocab" in w.names and stored_vocab and stored_vocab <= t.shape[0]:
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


def load(found: Mapping[str, list[Stored]], weights: Any, shardings: Any, family: str) -> Any:
    """Read weights into sharded arrays of the dtypes of `weights`; each device's part is read by itself.

    `weights` is a tree of `Weight`s with abstract values, `shardings` one of its form. A few are read at a time.

    Raises:
      UserError: a tensor holds NaN or infinity.
    """

    def one(path: tuple, w: Any, sharding: jax.sharding.Sharding) -> Any:
        name = path_name(path)
        tensors = found[name]
        axes = tuple(w.names.index(n) for n in layout.apart(w))
        grid = np.arange(len(tensors)).reshape([w.value.shape[a] for a in axes])

        def read(index: Any) -> np.ndarray:
            which = grid[tuple(index[a] for a in axes)]
            rest = tuple(s for a, s in enumerate(index) if a not in axes)
            sizes = [len(range(*s.indices(n))) for s, n in zip(index, w.value.shape, strict=True)]
            out = np.empty(sizes, w.value.dtype)
            by_tensor = np.moveaxis(out, axes, range(len(axes)))
            for at in np.ndindex(which.shape):
                part = layout.from_hf(tensors[which[at]].open(), w)[rest]
                by_tensor[at] = part
                if not finite(part):
                    raise UserError(
                        f"{layout.hf_names(name, w, family)[which[at]]}: holds NaN or infinity; the checkpoint is "
                        "damaged, copy or download it again"
                    )
            return out

        return w.like(jax.make_array_from_callback(w.value.shape, sharding, read))

    leaves, tree = jax.tree_util.tree_flatten_with_path(weights, is_leaf=is_weight)
    paths, boxes = zip(*leaves, strict=True)
    with ThreadPoolExecutor(_READERS) as pool:
        return jax.tree.unflatten(tree, pool.map(one, paths, boxes, jax.tree.leaves(shardings)))


def finite(x: np.ndarray) -> bool:
    """Whether no number is NaN or infinite; other than floats always are.

    >>> finite(np.ones(3, np.float16)), finite(np.array([1.0, np.inf], np.float32))
    (True, False)
    """
    mask = _EXPONENTS.get(x.dtype.itemsize, {}).get(x.dtype.name)
    if mask is None:
        return bool(np.isfinite(x).all()) if x.dtype.kind == "f" else True
    if x.dtype.name == "float32":
        return bool(np.isfinite(x).all())
    return not bool(((x.view(np.uint16) & mask) == mask).any())  # numpy has no quick test for half precision
