import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.explaining import changes
from jaxtune.nodes.lora import LoRA

RNG = np.random.default_rng(0)


def test_cka_forgets_rotations_scales_and_means():
    x, y = RNG.normal(size=(40, 6)), RNG.normal(size=(40, 9))
    turn = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    assert changes.cka(x, x) == pytest.approx(1.0, abs=1e-12)
    assert changes.cka(x, 3 * x @ turn + 7) == pytest.approx(1.0, abs=1e-9)
    centre = np.eye(40) - 1 / 40
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    hsic = np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))
    assert changes.cka(x, y) == pytest.approx(hsic, abs=1e-12)
    assert changes.cka(x[:5], y[:5]) == pytest.approx(changes.cka(y[:5], x[:5]), abs=1e-12)  # by tokens × tokens


def test_effective_rank_is_that_of_the_singular_values():
    a, b = RNG.normal(size=(24, 3)), RNG.normal(size=(3, 40))
    sigma = np.linalg.svd(a @ b, compute_uv=False)
    p = sigma[:3] / sigma[:3].sum()
    wanted = np.exp(-(p * np.log(p)).sum())
    np.testing.assert_allclose(changes.of_product(a, b), sigma[:3], rtol=1e-10)
    np.testing.assert_allclose(changes.singular_values(a @ b)[::-1][:3], sigma[:3], rtol=1e-6)
    assert changes.effective_rank(changes.of_product(a, b)) == pytest.approx(wanted, rel=1e-9)
    assert changes.effective_rank(changes.singular_values(a @ b)) == pytest.approx(wanted, rel=1e-4)
    assert changes.effective_rank(np.ones(5)) == pytest.approx(5.0)


def test_updates_are_found_where_they_are(words):
    base = words.tuned
    group = next(n for n in base.weights if n.startswith("layers_"))
    layers = base.weights[group]
    w = layers["self_attn"]["q_proj"]["weight"]  # [L, D, N, H]
    a, b = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((2, 32, 2), (2, 2, 4, 8)))
    b = b.at[0].set(0.0)  # the first layer stays
    norm = layers["input_layernorm"]["weight"]
    up = layers["mlp"]["up_proj"]["weight"]
    table = base.weights["embed_tokens"]["weight"]
    new = {
        **base.weights,
        "embed_tokens": {"weight": table.at[7].add(1.0)},
        group: {
            **layers,
            "input_layernorm": {"weight": norm.at[1].add(0.5)},
            "self_attn": {**layers["self_attn"], "q_proj": {"weight": LoRA(w, a, b, scale=0.5)}},
            "mlp": {**layers["mlp"], "up_proj": {"weight": up + 0.01}},
        },
    }
    found, large = changes.updates(dataclasses.replace(base, weights=new), base)
    by_name = {u.name: u for u in found}
    assert large == 0
    assert set(by_name) == {
        "embed_tokens/weight", "layers/1/input_layernorm/weight", "layers/1/self_attn/q_proj/weight",
        "layers/0/mlp/up_proj/weight", "layers/1/mlp/up_proj/weight",
    }  # fmt: skip
    delta = 0.5 * np.asarray(a[1], np.float64) @ np.asarray(b[1], np.float64).reshape(2, -1)
    q = by_name["layers/1/self_attn/q_proj/weight"]
    assert q.norm == pytest.approx(np.linalg.norm(delta), rel=1e-6)
    assert q.relative == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(np.asarray(w[1])), rel=1e-6)
    assert 1.0 < q.rank <= 2.0
    assert q.full == 32
    assert by_name["layers/0/mlp/up_proj/weight"].rank == pytest.approx(1.0, abs=1e-2)
    assert by_name["layers/1/input_layernorm/weight"].rank is None
    tables = changes.changed_rows(dataclasses.replace(base, weights=new), base, 5)
    name = base.tokenizer.convert_ids_to_tokens(7)
    share = np.sqrt(32) / np.linalg.norm(np.asarray(table[7]))
    assert tables == {"embed_tokens": [[name, pytest.approx(share, rel=1e-5)]]}
