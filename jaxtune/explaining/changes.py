"""What tuning changed: of each matrix the size and the effective rank of its update, activations, and tokens.

Dimensions: T tokens, n tokens of all texts, D embed, V vocab, I inputs and O outputs of a matrix, r rank of a factor.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import blueprint, job
from jaxtune.explaining.insides import Activations
from jaxtune.hf import soft_prompts
from jaxtune.layers import Weight, is_weight, plain_names
from jaxtune.nodes.lora import LoRA
from jaxtune.tuned import Opened, Tuned, draw, ready
from jaxtune.weights import Array, densify, is_node, path_name, under

_LARGEST = 2048  # the smaller side of a matrix whose singular values are computed
_TABLES = ("embed_tokens/weight", "lm_head/weight")
Tree = Any


class Update(NamedTuple):
    """What tuning added to a weight."""

    name: str  # plain
    norm: float  # Frobenius'
    relative: float  # to the norm of what was there
    rank: float | None  # effective; None of vectors, and of matrices that are too large
    full: int | None  # the greatest rank that there could be


# --- the base ---------------------------------------------------------------------------------------------------------


def base_of(name: str, adapter: str | None) -> str | None:
    """The model that `name` was tuned from, where that is known."""
    from pathlib import Path

    from jaxtune import config
    from jaxtune.hf import adapters

    folder = Path(name)
    if adapter is not None:
        return name
    if (folder / job.CONFIG).exists():
        return config.load(folder / job.CONFIG).model
    return soft_prompts.open_adapter(folder).base if (folder / adapters.CONFIG).exists() else None


def open_base(name: str, tuned: Tuned) -> Tuned:
    """The base of a tuned model, its layers in the same groups."""
    c = tuned.blueprint.decoder
    with jax.set_mesh(tuned.mesh):
        folder = job.model_folder(name)
        b = draw(folder, None, tuned.mesh, c.dtype, c.groups)
        weights = blueprint.materialise(b, jax.random.key(0))
        return ready(Opened(b, weights, folder, tokenizer=tuned.tokenizer), tuned.mesh)


# --- weights ----------------------------------------------------------------------------------------------------------


def updates(tuned: Tuned, base: Tuned) -> tuple[list[Update], int]:
    """What tuning added to each weight that is not as it was, and how many matrices were too large for their rank."""
    plain = {path_name(p): w for p, w in jax.tree_util.tree_leaves_with_path(tuned.blueprint.plain, is_leaf=is_weight)}
    old = {path_name(p): w for p, w in jax.tree_util.tree_leaves_with_path(base.weights, is_leaf=is_node)}
    out, large = [], 0
    for path, w in jax.tree_util.tree_leaves_with_path(tuned.weights, is_leaf=is_node):
        name = path_name(path)
        if name not in old and not is_node(w):  # a head that the base lacks
            continue
        before = under(w) if is_node(w) and w is not under(w) else old.get(name)
        names, info = plain_names(name), plain[name]
        for i, one in enumerate(names):
            new, was = (jax.tree.map(lambda x, i=i: x[i], y) if info.stacked else y for y in (w, before))
            found = _update(one, new, was, info)
            if found is not None:
                out.append(found[0])
                large += found[1]
    return out, large


def _update(name: str, new: Any, was: Any, info: Weight) -> tuple[Update, bool] | None:
    """Of one layer's weight; experts' matrices count together, their ranks by their mean."""
    names = info.names[1:] if info.stacked else info.names
    lead, is_matrix = info.lead - info.stacked, 0 < info.n_in < len(names) - (info.lead - info.stacked)
    there = np.asarray(densify(was), np.float64)
    size = float(np.linalg.norm(there))
    if isinstance(new, LoRA) and not is_node(new.a) and not is_node(new.b) and not lead and new.base is was:
        a_Ir = np.asarray(new.a, np.float64).reshape(-1, new.a.shape[-1])
        sigma = [new.scale * of_product(a_Ir, np.asarray(new.b, np.float64).reshape(new.b.shape[0], -1))]
        norm, large = float(np.linalg.norm(sigma[0])), False
    else:
        delta = np.asarray(densify(new), np.float64)
        delta = delta[tuple(slice(n) for n in there.shape)] - there  # a table that grew: the rows that were there
        norm = float(np.linalg.norm(delta))
        large = is_matrix and min(_sides(delta, lead, info.n_in)) > _LARGEST
        each = delta.reshape(-1, *_sides(delta, lead, info.n_in)) if is_matrix and not large else ()
        sigma = [singular_values(x) for x in each] if norm else []
    if norm == 0.0:
        return None
    rank = float(np.mean([effective_rank(s) for s in sigma])) if sigma else None
    full = min(_sides(there, lead, info.n_in)) if is_matrix else None
    return Update(name, norm, norm / (size or 1.0), rank, full), large


def _sides(x: np.ndarray, lead: int, n_in: int) -> tuple[int, int]:
    return int(np.prod(x.shape[lead : lead + n_in])), int(np.prod(x.shape[lead + n_in :]))


def of_product(a_Ir: np.ndarray, b_rO: np.ndarray) -> np.ndarray:
    """The singular values of `A B`, `[r]`, from its factors alone: A = Q R and Bᵀ = P S, so they are those of R Sᵀ."""
    return np.linalg.svd(np.linalg.qr(a_Ir).R @ np.linalg.qr(b_rO.T).R.T, compute_uv=False)


def singular_values(x_IO: np.ndarray) -> np.ndarray:
    """The singular values of a matrix, by way of its smaller Gram matrix: those below 1e-8 of the largest are noise."""
    small = x_IO if x_IO.shape[0] <= x_IO.shape[1] else x_IO.T
    return np.sqrt(np.maximum(np.linalg.eigvalsh(small @ small.T), 0.0))


def effective_rank(sigma: np.ndarray) -> float:
    """exp of the entropy of the singular values' shares (Roy & Vetterli, 2007,
    https://doi.org/10.5281/zenodo.40498).

    >>> round(effective_rank(np.array([3.0, 3.0, 0.0])), 6)
    2.0
    """
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def changed_rows(tuned: Tuned, base: Tuned, most: int) -> dict[str, list[list[Any]]]:
    """Of the tables of tokens that changed, the tokens whose rows did most: the norm of what was added, relative."""
    out = {}
    for name in _TABLES:
        module = name.split("/")[0]
        if module not in tuned.weights or module not in base.weights:
            continue
        axis = int(module == "lm_head")  # [D, V]
        w, was = tuned.weights[module]["weight"], base.weights[module]["weight"]
        share_V = np.asarray(_row_changes(w, under(w) if w is not under(w) else was, axis))
        words = tuned.tokenizer
        found = [(i, float(share_V[i])) for i in np.argsort(-share_V)[:most] if share_V[i] > 0]
        if found:
            out[module] = [[str(words.convert_ids_to_tokens(int(i))), v] for i, v in found]
    return out


@jax.jit
def _row_changes_of(new: Array, was: Array) -> Array:
    return jnp.linalg.norm(new - was, axis=1) / jnp.maximum(jnp.linalg.norm(was, axis=1), 1e-12)


def _row_changes(w: Any, was: Any, axis: int) -> Array:
    new, old = (jnp.moveaxis(densify(x).astype(jnp.float32), axis, 0) for x in (w, was))
    n = min(new.shape[0], old.shape[0])
    return _row_changes_of(new[:n], old[:n])


# --- what they do -----------------------------------------------------------------------------------------------------


def cka(x_nD: np.ndarray, y_nD: np.ndarray) -> float:
    """Linear centred kernel alignment (Kornblith et al., 2019, https://arxiv.org/abs/1905.00414): 1 where two sets of
    activations are the same but for a rotation and a scale, near 0 where they have nothing to do with each other.

    >>> x = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    >>> round(cka(x, 5 * x[:, ::-1] + 1), 9)
    1.0
    """
    x, y = (v.astype(np.float64) - v.mean(0, dtype=np.float64) for v in (x_nD, y_nD))
    if len(x) <= min(x.shape[1], y.shape[1]):  # the same by way of tokens × tokens
        k, m = x @ x.T, y @ y.T
        cross, own = (k * m).sum(), np.linalg.norm(k) * np.linalg.norm(m)
    else:
        cross = np.linalg.norm(x.T @ y) ** 2
        own = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(cross / own) if own else 1.0


def by_layer(tuned: Sequence[Activations], base: Sequence[Activations], kept: Sequence[np.ndarray]) -> list[float]:
    """CKA after each layer over the tokens of all texts that are `kept`."""
    pairs = ([x.hidden_LTD[:, k] for x, k in zip(xs, kept, strict=True)] for xs in (tuned, base))
    x_LnD, y_LnD = (np.concatenate(xs, 1) for xs in pairs)
    return [cka(x, y) for x, y in zip(x_LnD, y_LnD, strict=True)]


def likelier(tuned: Sequence[Activations], base: Sequence[Activations], most: int) -> tuple[np.ndarray, np.ndarray]:
    """How much likelier each next token became, the mean over all places, `[V]`; and the tokens that changed most."""
    n = sum(len(x.p_TV) for x in tuned)
    V = min(tuned[0].p_TV.shape[1], base[0].p_TV.shape[1])
    gain_V = sum((x.p_TV[:, :V] - y.p_TV[:, :V]).sum(0, dtype=np.float64) for x, y in zip(tuned, base, strict=True)) / n
    return gain_V, np.argsort(-np.abs(gain_V))[:most]


def divergence(tuned: Activations, base: Activations) -> np.ndarray:
    """Kullback and Leibler's of the next token after each place, tuned from base, in nats: `[T]`."""
    V = min(tuned.p_TV.shape[1], base.p_TV.shape[1])
    p, q = (np.maximum(x.p_TV[:, :V].astype(np.float64), 1e-30) for x in (tuned, base))
    return (p * np.log(p / q)).sum(1)
