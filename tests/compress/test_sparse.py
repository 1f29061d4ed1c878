"""Masks and updates are those of the papers, computed in float64 by numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.compress import sparse
from jaxtune.compress.sparse import Target
from jaxtune.errors import UserError

TARGETS = [Target(0.5), Target(0.5, 2, 4), Target(0.5, 4, 8)]


def correlated(seed: int, O: int = 12, I: int = 40, M: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """A matrix `[O, I]`, and `[M, I]` inputs of it that depend upon one another and differ in size."""
    rng = np.random.default_rng(seed)
    x_MI = rng.normal(size=(M, I)) @ rng.normal(size=(I, I)) * rng.uniform(0.2, 3, I)
    return rng.normal(size=(O, I)), x_MI


def by_the_paper(w_OI: np.ndarray, H: np.ndarray, to: Target, block: int) -> np.ndarray:
    """SparseGPT by optimal brain surgery, with an inverse of its own for each input that is left."""
    w_OI, (O, I) = w_OI.copy(), w_OI.shape
    H = H + 0.01 * np.diag(H).mean() * np.eye(I)
    inverses = [np.linalg.inv(H[i:, i:]) for i in range(I)]
    diagonal = np.array([h[0, 0] for h in inverses])
    mask = np.ones((O, I), bool)
    for i in range(I):
        if i % block == 0 and not to.m:
            score = w_OI[:, i : i + block] ** 2 / diagonal[i : i + block]
            order = np.argsort(score.ravel(), kind="stable")[: round(to.share * score.size)]
            flat = np.ones(score.size, bool)
            flat[order] = False
            mask[:, i : i + block] = flat.reshape(score.shape)
        if to.m and i % to.m == 0:
            score = w_OI[:, i : i + to.m] ** 2 / diagonal[i : i + to.m]
            for o in range(O):
                mask[o, i + np.argsort(score[o])[: to.m - to.n]] = False
        error_O = np.where(mask[:, i], 0, w_OI[:, i]) / diagonal[i]
        w_OI[:, i:] -= error_O[:, None] * inverses[i][0]
        w_OI[~mask[:, i], i] = 0
    return w_OI


@pytest.mark.parametrize("to", TARGETS, ids=lambda t: t.pattern or "half")
def test_sparsegpt_is_the_papers(to: Target) -> None:
    w_OI, x_MI = correlated(0)
    H = x_MI.T @ x_MI
    mine = np.asarray(sparse.sparsegpt(jnp.asarray(w_OI), jnp.asarray(H), to, block=16))
    theirs = by_the_paper(w_OI, H, to, 16)
    np.testing.assert_array_equal(mine == 0, theirs == 0)
    np.testing.assert_allclose(mine, theirs, atol=2e-3)


def test_a_pattern_does_not_end_with_a_block() -> None:
    w_OI, x_MI = correlated(0, O=4, I=24, M=100)
    mine = np.asarray(sparse.sparsegpt(jnp.asarray(w_OI), jnp.asarray(x_MI.T @ x_MI), Target(1 / 3, 2, 3), block=16))
    assert ((mine != 0).reshape(4, 8, 3).sum(-1) == 2).all()


def test_a_singular_hessian_is_damped_more(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(sparse.log, "warn", said.append)
    rng = np.random.default_rng(0)
    gram = np.full((8, 8), 1e6) + np.diag(rng.uniform(0, 1e-6, 8))
    new = sparse.sparsegpt(jnp.asarray(rng.normal(size=(4, 8))), jnp.asarray(gram), Target(0.5), damping=1e-9)
    assert np.isfinite(np.asarray(new)).all()
    assert "singular" in said[0]


@pytest.mark.parametrize("to", TARGETS, ids=lambda t: t.pattern or "half")
@pytest.mark.parametrize("seed", range(4))
def test_the_outputs_err_least_by_sparsegpt_then_wanda_then_magnitude(to: Target, seed: int) -> None:
    w, x = correlated(seed)
    w_OI, gram_II = jnp.asarray(w), jnp.asarray(x.T @ x)
    wanda = jnp.where(sparse.keep(sparse.wanda(w_OI, jnp.sqrt(jnp.diagonal(gram_II))), to, True), w_OI, 0)
    magnitude = jnp.where(sparse.keep(sparse.magnitude(w_OI), to, False), w_OI, 0)
    fitted = sparse.sparsegpt(w_OI, gram_II, to, block=16)
    errors = [float(np.sum(((w - np.asarray(n, np.float64)) @ x.T) ** 2)) for n in (fitted, wanda, magnitude)]
    assert errors == sorted(errors)
    assert float(sparse.output_error(w_OI, wanda, gram_II)) == pytest.approx(errors[1], rel=1e-4)
    for n in (fitted, wanda, magnitude):
        assert float((n == 0).mean()) == 0.5


@settings(max_examples=20, deadline=None)
@given(
    pattern=st.sampled_from(["1:2", "2:4", "4:8", "1:4"]),
    seed=st.integers(0, 2**20),
    ties=st.booleans(),
)
def test_n_of_m_inputs_are_kept_and_they_are_the_largest(pattern: str, seed: int, ties: bool) -> None:
    to = sparse.target(None, pattern)
    rng, groups = np.random.default_rng(seed), 3
    score = rng.integers(0, 3, (3, groups * to.m)) if ties else rng.normal(size=(3, groups * to.m)) ** 2
    kept = np.asarray(sparse.keep(jnp.asarray(score, jnp.float32), to, True)).reshape(3, groups, to.m)
    assert (kept.sum(-1) == to.n).all()
    split = score.reshape(3, groups, to.m)
    assert (np.where(kept, split, np.inf).min(-1) >= np.where(kept, -np.inf, split).max(-1)).all()


def test_shares_are_of_each_output_or_of_the_matrix() -> None:
    score = np.arange(40.0).reshape(4, 10)
    by_row = np.asarray(sparse.keep(jnp.asarray(score), Target(0.3), True))
    assert (by_row == (np.arange(10) >= 3)).all()
    whole = np.asarray(sparse.keep(jnp.asarray(score), Target(0.3), False))
    assert (whole == (score >= 12)).all()


def test_an_input_that_is_always_zero_goes_first() -> None:
    w, x = correlated(1, O=4, I=8, M=50)
    x[:, 3] = 0
    new = np.asarray(sparse.sparsegpt(jnp.asarray(w), jnp.asarray(x.T @ x), Target(0.25)))
    assert (new[:, 3] == 0).all()
    assert np.isfinite(new).all()


def test_what_stays_is_fitted_by_least_squares() -> None:
    w_OI, x_MI = correlated(2, O=5, I=12)
    H, keep = x_MI.T @ x_MI, np.arange(12) % 3 != 0
    ridge = 0.01 * np.diag(H).mean()
    rows = np.vstack([x_MI[:, keep], np.sqrt(ridge) * np.eye(keep.sum())])  # what is ridged is the change
    lost = np.vstack([x_MI[:, ~keep] @ w_OI[:, ~keep].T, np.zeros((keep.sum(), 5))])
    expected = w_OI.copy()
    expected[:, ~keep] = 0
    expected[:, keep] += np.linalg.lstsq(rows, lost, rcond=None)[0].T
    mine = sparse.refit(jnp.asarray(w_OI), jnp.asarray(H), jnp.asarray(keep))
    np.testing.assert_allclose(mine, expected, atol=2e-4)
    same = sparse.refit(jnp.asarray(w_OI), jnp.asarray(H), jnp.ones(12, bool))
    np.testing.assert_allclose(same, w_OI, atol=1e-6)


@pytest.mark.parametrize(
    ("sparsity", "pattern", "words"),
    [(None, None, "give one"), (0.5, "2:4", "give one"), (None, "4:2", "n:m"), (1.0, None, "to below 1")],
)
def test_a_target_is_a_share_or_a_pattern(sparsity: float | None, pattern: str | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        sparse.target(sparsity, pattern)
