"""Unstructured pruning of a whole model: which matrices, how much of each, and one layer after the other.

Dimensions: O outputs, I inputs, E experts.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import log
from jaxtune.compress import sparse
from jaxtune.compress.calibrate import Stats, through
from jaxtune.compress.sparse import Target
from jaxtune.errors import UserError
from jaxtune.layers import is_weight
from jaxtune.models.decoder import DecoderConfig, abstract_weights
from jaxtune.tuning.method import covering
from jaxtune.tuning.zeros import maskable
from jaxtune.weights import Array, path_name

Tree = Any
METHODS = ("magnitude", "wanda", "sparsegpt")
SCOPES = ("uniform", "global", "outliers")
_OUTLIER, _SPREAD = 5.0, 0.08  # M and λ of OWL


class Matrix(NamedTuple):
    """A matrix of every layer: `lead` axes along which it is piled up (experts), then `n_in` contracted ones."""

    n_in: int
    lead: int
    shape: tuple[int, ...]  # of one layer's

    @property
    def inputs(self) -> int:
        return prod(self.shape[self.lead : self.lead + self.n_in])

    def outputs_first(self, w: Array) -> Array:
        """As `[E, O, I]`; E is 1 where there are no experts."""
        return w.reshape(prod(self.shape[: self.lead]), self.inputs, -1).swapaxes(1, 2)

    def back(self, w_EOI: Array, like: Array) -> Array:
        """Of `outputs_first` the array that it was."""
        return w_EOI.swapaxes(1, 2).reshape(like.shape).astype(like.dtype)


def matrices(c: DecoderConfig) -> dict[str, Matrix]:
    """The matrices of a layer that can be pruned, by name, such as "self_attn/q_proj/weight": neither routers nor
    norms; the embeddings and the head are in no layer."""
    whole = abstract_weights(dataclasses.replace(c, groups=()))
    layer = next(x for name, x in whole.items() if name.startswith("layers_"))
    found = {path_name(p): w for p, w in jax.tree_util.tree_leaves_with_path(layer, is_leaf=is_weight)}
    return {n: Matrix(w.n_in, w.lead - 1, w.value.shape[1:]) for n, w in found.items() if maskable(f"layers/0/{n}", w)}


class Plan(NamedTuple):
    """What is asked for."""

    method: str  # of METHODS
    to: Target
    scope: str = "uniform"  # of SCOPES
    budgets: Mapping[str, float] = {}  # shares of matrices that a regex matches; the first that does holds
    skip: Sequence[str] = ()  # regexes on names of matrices that are left alone


def prune(c: DecoderConfig, weights: Tree, batches: Sequence[Mapping[str, Any]], plan: Plan) -> Tree:
    """The weights with zeros. Each layer sees what the pruned ones before it give.

    The scope says how the share is spread over matrices: "uniform", the same for each; "global", one threshold on the
    scores of all; "outliers", more where fewer weights stand out (OWL, Yin et al., 2023,
    https://arxiv.org/abs/2310.05175). The latter two look at the whole model first, and hold its scores on the host.

    Args:
      c: the decoder.
      weights: its arrays.
      batches: to calibrate with, see `calibrate.through`; magnitude alone needs none.
      plan: what is asked for.

    Raises:
      UserError: what is asked for does not go together, or a regex matches no matrix.
    """
    every = matrices(c)
    _check(plan, every, c.layers)
    if plan.method != "magnitude" and any(m.lead for m in every.values()):
        log.warn(
            f"experts see tokens of their own, which are not summed: they are pruned by magnitude, not {plan.method}"
        )
    shares = _shares(c, weights, batches, plan, every)

    def one(name: str, m: Matrix, w: Array, stats: Stats | None) -> Array:
        if name not in shares:
            return w
        return _pruned(w, m, stats, plan._replace(to=plan.to._replace(share=shares[name])))

    needed = () if plan.method == "magnitude" else batches
    return through(c, weights, needed, _visit(every, one))


def _visit(
    every: Mapping[str, Matrix], one: Callable[[str, Matrix, Array, Stats | None], Array]
) -> Callable[[int, Tree, Mapping[str, Stats]], Tree]:
    """A visit that gives each matrix, by its plain name without "/weight", to `one`."""

    def visit(i: int, layer: Tree, stats: Mapping[str, Stats]) -> Tree:
        def leaf(path: tuple, w: Array) -> Array:
            if (name := path_name(path)) not in every:
                return w
            short = name.removesuffix("/weight")
            return one(f"layers/{i}/{short}", every[name], w, stats.get(short))

        return jax.tree_util.tree_map_with_path(leaf, layer)

    return visit


def _pruned(w: Array, m: Matrix, stats: Stats | None, plan: Plan) -> Array:
    w_EOI = m.outputs_first(w)
    if plan.method == "sparsegpt" and stats is not None:
        return m.back(sparse.sparsegpt(w_EOI[0], stats.gram_II, plan.to)[None], w)
    rows = plan.method == "wanda" and stats is not None and plan.scope != "global"
    scores = jnp.stack([_scores(x, stats, plan.method) for x in w_EOI])
    kept = jax.vmap(lambda s: sparse.keep(s, plan.to, rows))(scores)
    return m.back(jnp.where(kept, w_EOI, 0), w)


def _scores(w_OI: Array, stats: Stats | None, method: str) -> Array:
    return sparse.magnitude(w_OI) if method == "magnitude" or stats is None else sparse.wanda(w_OI, stats.norms)


# --- how much of each -----------------------------------------------------------------------------------------------


def _check(plan: Plan, every: Mapping[str, Matrix], layers: int) -> None:
    names = [f"layers/{i}/{n.removesuffix('/weight')}" for i in range(layers) for n in every]
    covering(list(plan.budgets), names, "--budget")
    covering(list(plan.skip), names, "--skip")
    if plan.to.m and (plan.scope != "uniform" or plan.budgets):
        raise UserError(f"--pattern {plan.to.pattern} is the same in every matrix; leave --scope and --budget out")
    if plan.scope == "global" and plan.method == "sparsegpt":
        raise UserError("--scope global ranks scores, which sparsegpt has block by block only; take --scope outliers")
    for pattern, share in plan.budgets.items():
        if not 0 <= share < 1:
            raise UserError(f"--budget {pattern}={share}: is a share of zeros from 0 to below 1")


def _shares(
    c: DecoderConfig, weights: Tree, batches: Iterable[Any], plan: Plan, every: Mapping[str, Matrix]
) -> dict[str, float]:
    """The share of zeros of each matrix that is pruned, by plain name without "/weight"."""
    names = {f"layers/{i}/{n.removesuffix('/weight')}": m for i in range(c.layers) for n, m in every.items()}
    names = {n: m for n, m in names.items() if not any(re.search(p, n) for p in plan.skip)}
    if plan.to.m and (odd := next((n for n, m in names.items() if m.inputs % plan.to.m), None)):
        raise UserError(f"--pattern {plan.to.pattern}: {odd} has {names[odd].inputs} inputs, not a multiple; --skip it")
    given = {n: next((s for p, s in plan.budgets.items() if re.search(p, n)), None) for n in names}
    free = [n for n in names if given[n] is None]
    shares = dict.fromkeys(free, plan.to.share)
    if plan.scope != "uniform" and free:
        spread = by_threshold if plan.scope == "global" else by_outliers
        shares = spread(_all_scores(c, weights, batches, plan, every, free), plan.to.share)
    return {n: shares.get(n, 0.0) if s is None else float(s) for n, s in given.items()}


def _all_scores(
    c: DecoderConfig,
    weights: Tree,
    batches: Iterable[Any],
    plan: Plan,
    every: Mapping[str, Matrix],
    names: Sequence[str],
) -> dict[str, np.ndarray]:
    """The scores of these matrices of the whole model as it is, flat."""
    scores: dict[str, np.ndarray] = {}
    kind = "wanda" if plan.scope == "outliers" else plan.method

    def look(name: str, m: Matrix, w: Array, stats: Stats | None) -> Array:
        if name in names:
            scores[name] = np.concatenate([np.asarray(_scores(x, stats, kind)).ravel() for x in m.outputs_first(w)])
        return w

    through(c, weights, () if kind == "magnitude" else batches, _visit(every, look))
    return scores


def by_threshold(scores: Mapping[str, np.ndarray], share: float) -> dict[str, float]:
    """What share of each lies below one threshold, below which the given share of all of them lies.

    >>> by_threshold({"a": np.array([1.0, 2.0]), "b": np.array([3.0, 4.0])}, 0.5)
    {'a': 1.0, 'b': 0.0}
    """
    every = np.concatenate(list(scores.values()))
    count = round(share * every.size)
    threshold = np.partition(every, count)[count] if count < every.size else np.inf
    return {n: float((x < threshold).mean()) for n, x in scores.items()}


def by_outliers(scores: Mapping[str, np.ndarray], share: float) -> dict[str, float]:
    """Shares of layers within ± 0.08 of the given one, on average it: a layer of which more scores are above five times
    their mean keeps more of its weights.

    >>> by_outliers({"layers/0/a": np.r_[np.ones(98), 99.0, 99.0], "layers/1/a": np.ones(100)}, 0.5)
    {'layers/0/a': 0.42, 'layers/1/a': 0.58}
    """
    layers: dict[str, list[str]] = {}
    for n in scores:
        layers.setdefault(n.split("/")[1], []).append(n)
    together = {k: np.concatenate([scores[n] for n in names]) for k, names in layers.items()}
    ratio = {k: float((x > _OUTLIER * x.mean()).mean()) for k, x in together.items()}
    low, high = min(ratio.values()), max(ratio.values())
    keeps = {k: (r - low) / (high - low or 1.0) * 2 * _SPREAD for k, r in ratio.items()}
    sizes = {k: x.size for k, x in together.items()}
    mean = sum(keeps[k] * sizes[k] for k in sizes) / sum(sizes.values())
    return {n: round(min(max(share - keeps[k] + mean, 0.0), 0.999), 6) for k, names in layers.items() for n in names}
