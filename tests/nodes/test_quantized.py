import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune import blueprint, sharding, tuning
from jaxtune.config import Lora, Mesh, QLora
from jaxtune.hf import load
from jaxtune.layers import unbox
from jaxtune.nodes.lora import LoRA
from jaxtune.nodes.quantized import KINDS, NF4, Quantized, block, quantize
from jaxtune.tuning import method as m
from jaxtune.weights import densify, einsum, grouped, map_nodes, under
from tests.parity.families import write as write_family
from tests.tiny import write_tiny


def test_nf4_holds_its_own_code_book():
    """Published levels, at any scale, are held exactly: code i for level i."""
    w = jnp.tile(jnp.asarray(NF4) * 0.37, 4)[:, None]
    q = quantize(w, -2, "nf4")
    low, high = q.codes[:, 0] & 15, q.codes[:, 0] >> 4
    np.testing.assert_array_equal(low, np.tile(np.arange(16), 2))
    np.testing.assert_array_equal(high, np.tile(np.arange(16), 2))
    np.testing.assert_allclose(densify(q), w, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("group", "error"), [(64, 0.072792), (128, 0.076835), (256, 0.080326)]
)  # bitsandbytes 0.4x, its tests' own measure: randn(1024, 1024), absmax blocks
def test_nf4_errs_as_much_as_bitsandbytes_does(group, error):
    w = jax.random.normal(jax.random.key(0), (1024, 1024))
    assert abs(float(jnp.abs(densify(quantize(w, -2, "nf4", group)) - w).mean()) - error) < 0.005 * error


@given(st.integers(0, 2**31), st.sampled_from(list(KINDS)), st.sampled_from([4, 8, 32]), st.integers(-2, 2))
@settings(max_examples=40, deadline=None)
def test_an_error_is_at_most_half_of_the_widest_step(seed, kind, group, exponent):
    w = jax.random.normal(jax.random.key(seed), (2, 32, 6)) * 10.0**exponent
    q = quantize(w, -2, kind, group)
    assert q.shape == w.shape
    top = top_of(w, group)
    off = jnp.abs(densify(q) - w).reshape(2, -1, group, 6) / top
    step = {"nf4": 0.3039 / 2, "int4": 1 / 14, "int8": 1 / 254, "fp8": 1 / 28}[kind]
    doubled = float(top_of(w, group).max() / top.min() / 255)
    assert float(off.max()) <= step + doubled + 1e-5


def top_of(w, group):
    return jnp.abs(w).reshape(2, -1, group, 6).max(2, keepdims=True)


def test_zeros_stay_zero():
    for kind in KINDS:
        np.testing.assert_array_equal(densify(quantize(jnp.zeros((64, 2)), -2, kind)), 0.0)


def test_bits_are_counted():
    w = jnp.ones((4096, 256), jnp.bfloat16)
    bits = {k: sum(x.nbytes for x in jax.tree.leaves(quantize(w, -2, k))) * 8 / w.size for k in KINDS}
    assert bits == {"nf4": 4.12890625, "int4": 4.12890625, "int8": 8.12890625, "fp8": 8.12890625}


def test_blocks_divide():
    assert [block(n, 64) for n in (14336, 96, 44, 3, 2)] == [64, 48, 44, 0, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_the_dense_ones(kind):
    w = jax.random.normal(jax.random.key(1), (32, 2, 8)) * 0.1
    q, x = quantize(w, -3, kind, 16), jax.random.normal(jax.random.key(2), (2, 5, 32))
    y, pull = jax.vjp(lambda x: einsum("btd,dnh->btnh", x, q), x)
    z, pull_dense = jax.vjp(lambda x: einsum("btd,dnh->btnh", x, densify(q)), x)
    np.testing.assert_allclose(y, z, atol=1e-6)
    np.testing.assert_allclose(pull(y)[0], pull_dense(z)[0], atol=1e-5)
    kept = [r for r in jax.tree.leaves(pull) if jnp.issubdtype(r.dtype, jnp.floating) and r.itemsize > 1]
    assert all(r.size < w.size for r in kept)  # codes and scales, no matrix


def test_experts_are_multiplied_in_groups():
    w = jax.random.normal(jax.random.key(1), (3, 16, 4))
    q, x = quantize(w, -2, "nf4", 16), jnp.ones((6, 16))
    sizes = jnp.array([1, 2, 3])
    np.testing.assert_allclose(grouped(q, x, sizes), grouped(densify(q), x, sizes), atol=1e-5)


def make(folder, t, dtype="float32"):
    mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    b = blueprint.draw(folder, lambda d: tuning.make(t, d), mesh, dtype)
    return b, unbox(blueprint.materialise(b, jax.random.key(0)))


def logits(b, w):
    ids = jnp.arange(24).reshape(2, 12) % 300
    at = jnp.broadcast_to(jnp.arange(12), ids.shape)
    return b.model.apply({"params": w}, ids, jnp.ones_like(ids), at)[0].logits()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("quantized") / "m", layers=3, tied=False, embed=64, mlp=96)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_that_of_the_folder_quantised(folder, kind, monkeypatch):
    """Layer by layer as they are read, so that no array of a whole stack is ever there as it was read."""
    shapes, read = [], load._read

    def recorded(names, tensors, w, sharding):
        shapes.append((names[0], w.value.shape))
        return read(names, tensors, w, sharding)

    _, plain = make(folder, Lora(rank=2))
    monkeypatch.setattr(load, "_read", recorded)
    b, w = make(folder, Lora(rank=2, base=kind, group=32))
    assert all(len(s) < 3 or s[0] != 3 for n, s in shapes if "_proj" in n)
    layer, before = w["layers_0-2"], plain["layers_0-2"]
    q = layer["mlp"]["down_proj"]["weight"]
    assert isinstance(q, LoRA)
    assert isinstance(under(q), Quantized)
    want = jax.vmap(lambda x: quantize(x, -2, kind, 32))(before["mlp"]["down_proj"]["weight"].base)
    jax.tree.map(np.testing.assert_array_equal, under(q), want)
    assert not isinstance(under(layer["input_layernorm"]["weight"]), Quantized)
    assert not isinstance(under(w["embed_tokens"]["weight"]), Quantized)
    assert not isinstance(under(w["lm_head"]["weight"]), Quantized)
    dense = map_nodes(lambda x: densify(x) if isinstance(x, LoRA) else x, w)
    np.testing.assert_allclose(logits(b, w), logits(b, dense), atol=1e-4)
    off = jnp.abs(logits(b, w) - logits(b, plain)).max()
    assert 0 < off < {"nf4": 1.0, "int8": 0.1}[kind]


def test_only_adapters_train_and_merging_keeps_the_model(folder):
    b, w = make(folder, QLora(method="qlora", rank=2, group=32))
    trainable, frozen = m.split(w, b.labels)
    assert {x.dtype.name for x in jax.tree.leaves(trainable)} == {"float32"}
    assert "uint8" in {x.dtype.name for x in jax.tree.leaves(frozen)}
    moved = m.join(jax.tree.map(lambda x: x + 0.05, trainable), frozen)
    np.testing.assert_allclose(logits(b, m.merge(moved)), logits(b, moved), atol=2e-4)
    np.testing.assert_allclose(logits(b, m.strip(moved)), logits(b, w), atol=1e-5)


def test_experts_of_a_mixture_are_quantised(tmp_path):
    write_family(tmp_path / "m", "qwen3_moe")
    b, w = make(tmp_path / "m", QLora(method="qlora", rank=2, group=16))
    (stack,) = (v for k, v in w.items() if k.startswith("layers_"))
    assert isinstance(under(stack["mlp"]["experts"]["down_proj"]), Quantized)
    assert not isinstance(under(stack["mlp"]["gate"]["weight"]), Quantized)
    np.testing.assert_allclose(logits(b, m.merge(w)), logits(b, w), atol=2e-4)
