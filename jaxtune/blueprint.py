"""A model before its weights are read: shapes, labels, shardings, and where every tensor lies. Then the weights.

`validate` and `plan` stop here; `train` goes on from the same values.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune import log, sharding
from jaxtune.errors import UserError
from jaxtune.hf import files, layout
from jaxtune.layers import is_weight, plain_names
from jaxtune.models import families
from jaxtune.models.decoder import Decoder, DecoderConfig, abstract_weights
from jaxtune.tuning import method as tuning
from jaxtune.tuning.method import FROZEN, Method
from jaxtune.weights import densify, is_node, path_name

Tree = Any
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Blueprint(NamedTuple):
    """All that is known of a model without its weights. The trees are of one form, with `Weight`s or their likes."""

    folder: Path
    decoder: DecoderConfig
    method: Method
    weights: Tree  # abstract values, wrapped, in the dtypes that they are held in
    labels: Tree
    shardings: Tree
    tensors: dict[str, list[files.Tensor]]  # by path, one per layer

    @property
    def model(self) -> Decoder:
        return Decoder(self.decoder)

    @property
    def abstract(self) -> Tree:
        """Shapes, dtypes and shardings as `jax.jit(...).lower` takes them."""
        return jax.tree.map(
            lambda w, s: jax.ShapeDtypeStruct(w.value.shape, w.value.dtype, sharding=s),
            self.weights,
            self.shardings,
            is_leaf=is_weight,
        )


def draw(
    folder: Path,
    make_method: Callable[[DecoderConfig], Method],
    mesh: jax.sharding.Mesh,
    compute_dtype: str,
    remat: str = "none",
) -> Blueprint:
    """The blueprint of a model folder under a tuning method; no weight is read and no device is used.

    Raises:
      UserError: the config is not supported, tensors do not fit it, or the method asks for what is not there.
    """
    decoder = families.from_hf(read_config(folder), str(folder / "config.json"))
    method = make_method(decoder)
    one_group = abstract_weights(decoder)
    groups = tuning.groups(method, one_group, decoder.layers)
    decoder = dataclasses.replace(decoder, groups=groups, dtype=compute_dtype, remat=remat)
    plain = abstract_weights(decoder) if len(groups) > 1 else one_group
    wrapped = tuning.wrapped_shapes(method, plain)
    labels = tuning.label(method, wrapped)
    weights = tuning.cast(wrapped, labels, compute_dtype)
    tensors = files.match(files.read_folder(folder), plain, decoder.tied, str(folder))
    return Blueprint(folder, decoder, method, weights, labels, sharding.shardings(weights, mesh, log.warn), tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json."""
    file = folder / "config.json"
    try:
        return json.loads(file.read_text())
    except FileNotFoundError as e:
        if not folder.exists():
            raise UserError(f"{folder}: no such model folder") from e
        raise UserError(f"{folder}: has no config.json; a Hugging Face model folder was expected") from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{file}: not JSON ({e}); copy or download it again") from e


def materialise(b: Blueprint, key: jax.Array, base: bool = True) -> Tree:
    """The `Weight`s with their arrays: those of the files, and the method's own (adapters), made on their devices.

    Without `base` the files are not read, and their weights stay abstract: enough for `full_tensors`.
    """
    plain = tuning.strip(b.weights)
    if base:
        plain = files.load(b.tensors, plain, tuning.strip(b.shardings))
    leaves, tree = jax.tree_util.tree_flatten_with_path(b.weights, is_leaf=is_weight)
    places = dict(zip((p for p, _ in leaves), jax.tree.leaves(b.shardings), strict=True))

    def own(key: jax.Array) -> dict[str, Any]:
        """The method's leaves: those that are no longer the abstract values that went in."""
        wrapped = tuning.wrap(b.method, tuning.strip(b.weights), key)
        found = jax.tree_util.tree_leaves_with_path(wrapped, is_leaf=is_weight)
        return {path_name(p): w.value for p, w in found if not isinstance(w.value, jax.ShapeDtypeStruct)}

    where = {path_name(p): s for p, s in places.items()}
    made: dict[str, Any] = {}
    if b.method.made:
        made = {name: jax.device_put(x, where[name]) for name, x in own(key).items()}
    elif shapes := jax.eval_shape(own, key):
        made = jax.jit(own, out_shardings={name: where[name] for name in shapes})(key)
    values = iter(jax.tree.leaves(plain, is_leaf=is_weight))
    filled = [w.like(made[path_name(p)]) if path_name(p) in made else next(values) for p, w in leaves]
    return jax.tree.unflatten(tree, filled)


def boxed(b: Blueprint, arrays: Tree) -> Tree:
    """Plain arrays of the blueprint's form as `Weight`s again."""
    return jax.tree.map(lambda w, x: w.like(x), b.weights, arrays, is_leaf=is_weight)


def full_tensors(b: Blueprint, weights: Tree, dtype: np.dtype | None = None) -> dict[str, files.Entry]:
    """The model's tensors under their Hugging Face names: nodes merged, a layer at a time, in the base's own dtypes.

    What was not trained is read from the base again, so it comes out bit by bit as it went in, whatever the compute
    dtype was.
    """
    out: dict[str, files.Entry] = {}
    leaves = jax.tree_util.tree_leaves_with_path(weights, is_leaf=lambda x: is_node(x) or is_weight(x))
    labels = {path_name(p): found for p, found in jax.tree_util.tree_leaves_with_path(b.labels)}
    for path, w in leaves:
        name = path_name(path)
        trained = not is_node(w) and labels[name] != FROZEN
        for i, (plain, tensor) in enumerate(zip(plain_names(name), b.tensors[name], strict=True)):
            wanted = tensor.dtype if dtype is None else dtype

            def data(
                w: Any = w, i: int = i, t: files.Tensor = tensor, trained: bool = trained, to: Any = wanted
            ) -> Any:
                if is_node(w):
                    return _merged(w, i, t).astype(to)
                if trained:
                    return layout.to_hf(np.asarray(w.value[i] if w.stacked else w.value), w).astype(to)
                return t.open().astype(to, copy=False)

            out[layout.hf_name(plain)] = files.Entry(tensor.shape, wanted, data)
    stored = files.read_folder(b.folder)
    if b.decoder.tied and _HEAD in stored:  # under the name, or names, that the base has
        out[_HEAD] = out[_EMBED]
        if _EMBED not in stored:
            del out[_EMBED]
    return out


def _merged(node: Any, i: int, tensor: files.Tensor) -> np.ndarray:
    """One layer of a node as a dense tensor, on the base's tensor in full precision."""
    base = tuning.strip(node)
    own = dataclasses.replace(node, base=None)
    one = jax.tree.map(lambda w: w.value[i] if w.stacked else w.value, own, is_leaf=is_weight)
    dense = densify(dataclasses.replace(one, base=jax.numpy.asarray(layout.from_hf(tensor.open(), base))))
    return layout.to_hf(np.asarray(dense), base)
