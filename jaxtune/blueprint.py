"""A model before its weights are read: shapes, labels, shardings, and where every tensor lies. Then the weights.

`validate` and `plan` stop here; `train` goes on from the same values.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxtune import kernels, log, sharding
from jaxtune.errors import UserError
from jaxtune.hf import files, layout, load, quantized, tokenizer
from jaxtune.hf.adapters import Adapter
from jaxtune.hf.soft_prompts import SoftPrompts
from jaxtune.layers import Weight, is_weight, unbox
from jaxtune.models import families, heads, pipeline
from jaxtune.models.decoder import Decoder, DecoderConfig, abstract_weights
from jaxtune.models.heads import TaskHead
from jaxtune.nodes.masked import Masked
from jaxtune.tuning import method as tuning
from jaxtune.tuning.method import CHOSEN, FROZEN, Method
from jaxtune.weights import densify, is_node, path_name, under

Tree = Any


class Blueprint(NamedTuple):
    """All that is known of a model without its weights. The trees are of one form, with `Weight`s or their likes."""

    folder: Path
    decoder: DecoderConfig
    method: Method
    plain: Tree  # abstract values before anything is wrapped or quantised, in the dtypes that they are read in
    weights: Tree  # abstract values, wrapped, in the dtypes that they are held in
    labels: Tree
    shardings: Tree  # of `weights`
    places: Tree  # shardings of `plain`
    tensors: dict[str, list[load.Stored]]  # by path, see `layout.places`
    stored: Mapping[str, load.Stored]  # the folder's tensors
    stored_vocab: int  # tokens of the folder's model

    @property
    def model(self) -> Decoder:
        return Decoder(self.decoder)

    @property
    def virtual_ids(self) -> range:
        """The ids with which every text starts: those after the table's rows, as many as the method says."""
        return range(self.decoder.rows, self.decoder.rows + self.method.virtual)

    @property
    def abstract(self) -> Tree:
        """Shapes, dtypes and shardings as `jax.jit(...).lower` takes them."""
        return jax.tree.map(
            lambda w, s: jax.ShapeDtypeStruct(w.value.shape, w.value.dtype, sharding=s),
            self.weights,
            self.shardings,
            is_leaf=is_weight,
        )


class Sketch(NamedTuple):
    """A model under a tuning method, known from its config alone; see `Blueprint`."""

    decoder: DecoderConfig
    method: Method
    plain: Tree
    weights: Tree
    labels: Tree


def sketch(
    decoder: DecoderConfig,
    make_method: Callable[[DecoderConfig], Method],
    compute_dtype: str,
    remat: str = "none",
    param_dtype: str = "float32",
    groups: Sequence[int] | None = None,
) -> Sketch:
    """Shapes, dtypes and labels; neither files nor devices are looked at. Arguments as of `draw`."""
    method = make_method(decoder)
    one_group = abstract_weights(decoder)
    groups = tuple(groups or tuning.groups(method, one_group, decoder.layers))
    decoder = dataclasses.replace(decoder, groups=groups, dtype=compute_dtype, remat=remat)
    plain = abstract_weights(decoder) if len(groups) > 1 else one_group
    wrapped = tuning.wrapped_shapes(method, plain)
    labels = tuning.label(method, wrapped)
    cast = tuning.cast(wrapped, labels, compute_dtype, param_dtype)
    weights = tuning.quantized(method, cast, labels)
    return Sketch(decoder, method, tuning.strip(cast), weights, tuning.label(method, weights))


def draw(
    folder: Path,
    make_method: Callable[[DecoderConfig], Method],
    mesh: jax.sharding.Mesh,
    compute_dtype: str,
    remat: str = "none",
    adapter: Adapter | SoftPrompts | None = None,
    vocab: int | None = None,
    multiple: int = 1,
    param_dtype: str = "float32",
    groups: Sequence[int] | None = None,
    task: TaskHead | Literal["own"] | None = "own",
    seed: int = 0,
    attention: str = "xla",
    rules: sharding.Rules = sharding.RULES,
) -> Blueprint:
    """The blueprint of a model folder under a tuning method; no weight is read and no device is used.

    Args:
      folder: in Hugging Face format, or a cache of one.
      make_method: the tuning method for a decoder.
      mesh: over which weights are split.
      compute_dtype: of activations and frozen weights.
      remat: see `layers.stack`.
      adapter: whose whole tensors stand in for the folder's.
      vocab: how many tokens the model shall have, where that is more than the folder's.
      multiple: the table is padded to a multiple of this.
      param_dtype: of trained weights.
      groups: how many consecutive layers are scanned together, where that is not as the method asks; those of one group
        have to be alike in what is wrapped and what trains.
      task: the head, where it is not to be the folder's own; None is a language model's.
      seed: of a head that the folder lacks.
      attention: the kernel, or "auto".
      rules: which mesh axes split what, see `sharding.rules`.

    Raises:
      UserError: the config is not supported, tensors do not fit it, or the method asks for what is not there.
    """
    hf = read_config(folder)
    decoder = families.from_hf(hf, str(folder / "config.json"))
    quantized.check(hf.get(quantized.KEY), str(folder / "config.json"))
    own = decoder.task
    if task != "own" and task != own:
        tied = bool(hf.get("tie_word_embeddings", decoder.tied)) and task is None
        decoder = dataclasses.replace(decoder, task=task, tied=tied)
    stored_vocab, vocab = decoder.vocab, max(decoder.vocab, vocab or 0)
    decoder = dataclasses.replace(decoder, vocab=vocab, vocab_rows=table_rows(vocab, multiple))
    laid = sketch(decoder, make_method, compute_dtype, remat, param_dtype, groups)
    laid, where, places = lay_out(laid, mesh, attention, rules)
    decoder, method, plain, weights, labels = laid
    stored: Mapping[str, load.Stored] = load.read_folder(folder, plain, decoder.family)
    if hf.get(quantized.KEY):
        stored = quantized.dense_tensors(stored, hf[quantized.KEY], str(folder))
    stored = heads.renamed(stored, own, decoder.family, back=True)
    if decoder.task is not None:
        stored = load.with_head(stored, plain, decoder.family, own == decoder.task, seed)
    elif own is not None and decoder.tied:
        stored = load.with_head(stored, plain, decoder.family, False, seed)
    mine = stored
    if adapter is not None:
        stored = adapter.replace(stored, decoder.family, decoder.tied)
    tensors = load.match(stored, plain, decoder.family, decoder.tied, str(folder), stored_vocab)
    return Blueprint(folder, decoder, method, plain, weights, labels, where, places, tensors, mine, stored_vocab)


def lay_out(
    s: Sketch, mesh: jax.sharding.Mesh, attention: str, rules: sharding.Rules, device: Any = None
) -> tuple[Sketch, Tree, Tree]:
    """A sketch with its kernel of attention, and shardings of its weights and of its plain ones.

    Arguments as of `draw`; `device` is what is compiled for, where that is not the mesh's.

    Raises:
      UserError: the kernel cannot run, or the layers cannot be stages.
    """
    d, device = s.decoder, mesh.devices.flat[0] if device is None else device
    kernel = kernels.kind(attention, device, d.head, d.dtype, d.attention_softcap, s.method.past).name
    if (stages := mesh.shape["stage"]) > 1:
        pipeline.check(stages, d.layers, len(d.groups), d.experts)
    where = sharding.shardings(s.weights, mesh, log.warn, rules)
    places = sharding.shardings(s.plain, mesh, lambda _: None, rules)
    return s._replace(decoder=dataclasses.replace(d, attention=kernel)), where, places


def table_rows(vocab: int, multiple: int) -> int:
    """Rows of a table for so many tokens, padded to a multiple."""
    return -(-vocab // multiple) * multiple


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


def dense_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json for its tensors as they are read: without quantisation."""
    return {k: v for k, v in read_config(folder).items() if k != quantized.KEY}


def materialise(b: Blueprint, key: jax.Array, base: bool = True, shared: Mapping[str, Tree] | None = None) -> Tree:
    """The `Weight`s with their arrays: those of the files, and the method's own (adapters), made on their devices.

    Without `base` the files are not read where that can be, and their weights stay abstract: enough for `full_tensors`.
    What is in `shared` (see `from_folder`) is not read again.
    """
    beneath = tuning.strip(b.weights)
    if base or b.method.from_base:
        beneath = _read(b, shared or {})
    leaves, tree = jax.tree_util.tree_flatten_with_path(b.weights, is_leaf=is_weight)
    where = {path_name(p): s for (p, _), s in zip(leaves, jax.tree.leaves(b.shardings), strict=True)}
    made = _own(b, key, unbox(beneath) if b.method.from_base else None, where)
    values = iter(jax.tree.leaves(beneath, is_leaf=is_weight))
    filled = [w.like(made[path_name(p)]) if path_name(p) in made else next(values) for p, w in leaves]
    return jax.tree.unflatten(tree, filled)


def _read(b: Blueprint, shared: Mapping[str, Tree]) -> Tree:
    """The weights beneath the method's nodes: those of `shared`, by path, and the others from their files."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(b.plain, is_leaf=is_weight)
    found = {path_name(p): (w, place) for (p, w), place in zip(leaves, jax.tree.leaves(b.places), strict=True)}
    wanted = {n: w for n, (w, _) in found.items() if n not in shared}
    places = {n: found[n][1] for n in wanted}
    read = load.load(b.tensors, wanted, places, b.decoder.family, _held(b)) if wanted else {}
    return jax.tree.unflatten(tree, [shared[n] if n in shared else read[n] for n in found])


def from_folder(b: Blueprint, weights: Tree) -> dict[str, Tree]:
    """Of the folder's model without any adapter, in the groups of `b`: the weights that are `b`'s too, by path.

    What an adapter brings whole, and tables that grow, are not among them.
    """
    own = {id(t) for t in b.stored.values()}
    leaves = jax.tree_util.tree_leaves_with_path(weights, is_leaf=lambda x: is_node(x) or is_weight(x))
    return {path_name(p): w for p, w in leaves if all(id(t) in own for t in b.tensors[path_name(p)])}


def _held(b: Blueprint) -> dict[str, load.Held]:
    """The weights that are held in another form than they are read in, by path."""
    forms = jax.tree_util.tree_leaves_with_path(tuning.strip(b.weights), is_leaf=lambda x: is_node(x) or is_weight(x))
    places = jax.tree.leaves(tuning.strip(b.shardings), is_leaf=is_node)
    kind, group = b.method.base or ("", 0)

    def change(w: Weight) -> Tree:
        return tuning.quantize_weight(w, kind, group)

    return {
        path_name(p): load.Held(change, unbox(form), place)
        for (p, form), place in zip(forms, places, strict=True)
        if is_node(form)
    }


def _own(b: Blueprint, key: jax.Array, bases: Tree | None, where: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The method's leaves, by path: all of a wrapped weight but the weight itself."""

    def own(key: jax.Array, bases: Tree | None) -> dict[str, Any]:
        under = b.plain
        if bases is not None:
            under = jax.tree.map(lambda w, x: w.like(densify(x)), b.plain, bases, is_leaf=is_weight)
        wrapped = tuning.wrap(b.method, under, key)
        given = {id(w) for w in jax.tree.leaves(under, is_leaf=is_weight)}
        found = jax.tree_util.tree_leaves_with_path(wrapped, is_leaf=is_weight)
        return {path_name(p): w.value.astype(dtypes[path_name(p)]) for p, w in found if id(w) not in given}

    leaves = jax.tree_util.tree_leaves_with_path(b.weights, is_leaf=is_weight)
    dtypes = {path_name(p): w.value.dtype for p, w in leaves}
    if b.method.made:
        return {name: jax.device_put(x, where[name]) for name, x in own(key, bases).items()}
    if not (shapes := jax.eval_shape(own, key, bases)):
        return {}
    return jax.jit(own, out_shardings={name: where[name] for name in shapes})(key, bases)


def boxed(b: Blueprint, arrays: Tree) -> Tree:
    """Plain arrays of the blueprint's form as `Weight`s again."""
    return jax.tree.map(lambda w, x: w.like(x), b.weights, arrays, is_leaf=is_weight)


def adapted(b: Blueprint, weights: Tree) -> dict[str, tuple[Weight, Any]]:
    """What the method put upon weights, by path: the abstract weight as the files hold it, and the node."""
    plain = {path_name(p): w for p, w in jax.tree_util.tree_leaves_with_path(b.plain, is_leaf=is_weight)}
    nodes = jax.tree_util.tree_leaves_with_path(weights, is_leaf=lambda x: is_node(x) or is_weight(x))
    return {path_name(p): (plain[path_name(p)], w) for p, w in nodes if is_node(w) and w is not under(w)}


def full_tensors(
    b: Blueprint, weights: Tree, dtype: np.dtype | None = None, only_whole: bool = False
) -> dict[str, files.Entry]:
    """The model's tensors under their Hugging Face names: nodes merged, a layer at a time, in the base's own dtypes.

    What was not trained is read from the base again, so it comes out bit by bit as it went in, whatever the compute
    dtype was. With `only_whole` those that trained without a node or grew, and the biases of those modules: what an
    adapter has to bring along.
    """
    out: dict[str, files.Entry] = {}
    leaves = jax.tree_util.tree_leaves_with_path(weights, is_leaf=lambda x: is_node(x) or is_weight(x))
    labels = {path_name(p): found for p, found in jax.tree_util.tree_leaves_with_path(b.labels)}
    plain = {path_name(p): w for p, w in jax.tree_util.tree_leaves_with_path(b.plain, is_leaf=is_weight)}
    for path, w in leaves:
        name = path_name(path)
        base, mask = plain[name], None
        if isinstance(w, Masked):
            w, mask = w.whole, w.mask
        label = labels.get(name if mask is None else f"{name}/whole", FROZEN)
        trained = not is_node(w) and label != FROZEN
        names = layout.hf_names(name, base, b.decoder.family)
        table = "vocab" in base.names
        beside = name.endswith("/bias") and labels.get(f"{name.removesuffix('bias')}weight", FROZEN) != FROZEN
        if only_whole and not (trained or beside or (table and b.decoder.vocab > b.stored_vocab)):
            continue
        for hf_name, at, tensor in zip(names, layout.places(base), b.tensors[name], strict=True):
            wanted = tensor.dtype if dtype is None else dtype

            rows = b.decoder.vocab if table else tensor.shape[0]  # without padding

            def data(
                w: Any = w,
                base: Weight = base,
                at: Any = at,
                t: load.Stored = tensor,
                trained: bool = trained,
                chosen: bool = label == CHOSEN,
            ) -> np.ndarray:
                if not trained:
                    return _merged(w, base, at, t) if is_node(w) and w is not under(w) else t.open()
                array = layout.to_hf(np.asarray(layout.pick(w, at)), base)
                if chosen and np.array_equal(t.open().astype(array.dtype), array):  # never trained
                    return t.open()
                return array

            def final(
                data: Callable[[], np.ndarray] = data,
                to: np.dtype = wanted,
                n: int = rows,
                mask: Any = mask,
                base: Weight = base,
                at: Any = at,
            ) -> np.ndarray:
                with np.errstate(over="ignore"):  # what becomes infinite is refused when it is written
                    array = data()[:n].astype(to, copy=False)
                if mask is None:
                    return array
                return np.where(layout.to_hf(np.asarray(layout.pick(mask, at)), base), array, np.zeros((), to))

            out[hf_name] = files.Entry((rows, *tensor.shape[1:]), wanted, final)
    if only_whole:
        return out
    if b.decoder.tied and layout.HEAD in b.stored:  # under the name, or names, that the base has
        out[layout.HEAD] = out[layout.EMBED]
        if layout.EMBED not in b.stored:
            del out[layout.EMBED]
    for name, t in b.stored.items():  # buffers that old files carry go along
        if layout.UNTRAINED.search(name):
            out[name] = files.Entry(t.shape, t.dtype, t.open)
    return heads.renamed(out, b.decoder.task, b.decoder.family)


def write_config(folder: Path, hf: Mapping[str, Any], decoder: DecoderConfig, dtype: str | None = None) -> None:
    """Write config.json where it is not there as it should be: with the number of tokens, the head, the dtype if given,
    and quantised or not as `hf` says."""
    changed: dict[str, Any] = {"vocab_size": decoder.vocab}
    if dtype is not None:
        changed["dtype" if "dtype" in hf else "torch_dtype"] = dtype
    changed |= heads.to_hf(decoder.task, hf, decoder.family)
    if decoder.task is not None and hf.get("pad_token_id") is None:  # by which transformers finds the last token
        end = hf.get("eos_token_id")
        own = tokenizer.pad_id(folder)  # as users will pad
        changed["pad_token_id"] = own if own is not None else end[0] if isinstance(end, list) else end
    file = folder / "config.json"
    other = not file.exists() or read_config(folder).get(quantized.KEY) != hf.get(quantized.KEY)
    if other or any(hf.get(k) != v for k, v in changed.items()):
        file.write_text(json.dumps({**hf, **changed}, indent=2) + "\n")


def _merged(node: Any, base: Weight, at: dict[str, int], tensor: load.Stored) -> np.ndarray:
    """One tensor of a node, dense, on the base's tensor in full precision, whatever form the base is held in."""

    def own(w: Any) -> Any:
        """The node's own leaves in this place, upon the tensor."""
        if w is under(node):
            return jax.numpy.asarray(layout.from_hf(tensor.open(), base))
        fields = {f.name: getattr(w, f.name) for f in dataclasses.fields(w) if f.name != "base"}
        leaves = {k: layout.pick(x, at) for k, x in fields.items() if is_weight(x)}
        return dataclasses.replace(w, **leaves, base=own(w.base))

    return layout.to_hf(np.asarray(densify(own(node))), base)
