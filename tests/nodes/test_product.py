"""Products in 8 bits and gradients in float32: near the plain ones, in the dtypes that are asked for."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import job as jobs
from jaxtune import log, run
from jaxtune.errors import UserError
from jaxtune.nodes.lora import LoRA
from jaxtune.nodes.product import with_products
from jaxtune.nodes.quantized import quantize
from jaxtune.weights import einsum
from tests.tiny import make_config


def drawn(shape, seed, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def loss(weights, x, **asked):
    w = with_products(weights, **asked)["layers_0-0"]["self_attn"]["q_proj"]["weight"]
    return (einsum("btd,dnh->btnh", x, w).astype(jnp.float32) ** 2).sum()


def tree(w):
    return {"layers_0-0": {"self_attn": {"q_proj": {"weight": w}}, "norm": {"weight": jnp.ones(4)}}}


def cosine(a, b):
    a, b = (np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(t)]) for t in (a, b))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("adapter", [False, True])
def test_gradients_in_8_bits_point_where_exact_ones_do(kind, adapter):
    pytest.importorskip("qwix")
    w = drawn((32, 4, 8), 0, jnp.float32)
    w = LoRA(w, drawn((32, 2), 1), drawn((2, 4, 8), 2)) if adapter else w
    x = drawn((2, 16, 32), 3, jnp.float32)
    want, d_want = jax.value_and_grad(loss, (0, 1))(tree(w), x)
    got, d_got = jax.value_and_grad(loss, (0, 1))(tree(w), x, matmuls=kind)
    assert abs(got / want - 1) < 0.02
    assert got != want
    assert cosine(d_got, d_want) > 0.99
    assert jax.tree.map(lambda g: g.dtype, d_got) == jax.tree.map(lambda g: g.dtype, d_want)
    text = jax.jit(jax.grad(loss, (0, 1)), static_argnames="matmuls").lower(tree(w), x, matmuls=kind).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert sum(("xi8>" if kind == "int8" else "xf8E4M3FN>") in line for line in dots) >= (2 if adapter else 3)


def test_gradients_are_made_in_float32_where_asked():
    """What devices add up is the result of the product that makes a gradient."""
    x, w = drawn((2, 16, 32), 0), drawn((32, 4, 8), 1, jnp.float32)
    node = LoRA(w.astype(jnp.bfloat16), drawn((32, 2), 2, jnp.float32), drawn((2, 4, 8), 3, jnp.float32))
    for weights, wide in ((w, True), (w, False), (node, True)):
        text = jax.jit(jax.grad(loss), static_argnames="wide").lower(tree(weights), x, wide=wide).as_text()
        made = [line.split("->")[1] for line in text.splitlines() if "dot_general" in line]
        assert any("f32>" in line and "bf16" not in line for line in made) == wide
    exact = jax.grad(loss)(tree(w), x.astype(jnp.float32))
    assert cosine(jax.grad(loss)(tree(w), x, wide=True), exact) > 0.999


def test_runs_in_8_bits_and_exports_the_same_names(tiny, sums_file, tmp_path):
    pytest.importorskip("qwix")
    last = {}
    for kind in ("same", "int8"):
        c = make_config(tiny, sums_file, tmp_path / kind, tuning={"method": "lora", "rank": 4}, train__matmuls=kind)
        folder = run.train(c)
        last[kind] = [m["loss"] for m in log.read_metrics(folder / "metrics.jsonl") if "loss" in m][-1]
        assert jobs.prepare(c).state.saved().keys() == {"trainable", "optimiser", "step", "key"}
    assert last["int8"] != last["same"]
    assert abs(last["int8"] / last["same"] - 1) < 0.02
    names = [sorted(p.name for p in (tmp_path / kind / "export").iterdir()) for kind in last]
    assert names[0] == names[1]


def test_what_is_not_built_is_refused(tiny, sums_file, tmp_path, monkeypatch):
    q = quantize(drawn((32, 32), 0), -2, "int8")
    with pytest.raises(UserError, match=r"train\.matmuls: .*q_proj/weight is held as Quantized"):
        with_products(tree(LoRA(q, jnp.ones((32, 2)), jnp.ones((2, 32)))), "int8")
    with pytest.raises(UserError, match=r"train\.reduce_dtype is not for experts"):
        with_products({"layers_0-0": {"mlp": {"experts": {"up_proj": {"weight": jnp.ones((2, 2, 2))}}}}}, wide=True)
    with pytest.raises(UserError, match=r"train\.reduce_dtype=bfloat16: .* set train\.compute_dtype=bfloat16"):
        jobs.prepare(make_config(tiny, sums_file, tmp_path, train__reduce_dtype="bfloat16"))
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match=r"pip install 'jaxtune\[quant\]'"):
        jobs.prepare(make_config(tiny, sums_file, tmp_path, train__matmuls="int8"))
