import dataclasses

import jax
import numpy as np

from jaxtune import tuned
from jaxtune.attention import rounded
from jaxtune.generate import Sampling
from jaxtune.models.decoder import Decoder
from jaxtune.nodes.soft_prompt import Prefix


def test_rounded_reaches_from_its_greatest_number_down_and_errs_by_half_a_step():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 8)).astype(np.float32)
    x[0, 0, 0, 0] = 0
    codes, scale = (np.asarray(a) for a in rounded(x))
    assert (codes.dtype, codes.shape, scale.shape) == (np.int8, x.shape, (2, 3, 4, 5, 1))
    assert np.abs(codes.astype(np.float64) * scale - x).max() <= scale.max() / 2 * (1 + 1e-5)
    assert np.abs(codes).max(-1)[x.any(-1)].min() == 127


def test_logits_over_an_int8_past_are_close_and_the_cache_is_a_quarter(tiny):
    model = tuned.open_model(str(tiny))
    ids_BT = np.random.default_rng(1).integers(3, 290, (2, 24)).astype(np.int32)
    ones, at = np.ones_like(ids_BT), np.broadcast_to(np.arange(24), (2, 24))

    def last(kv: str) -> tuple[np.ndarray, int]:
        decoder = Decoder(dataclasses.replace(model.blueprint.decoder, kv=kv))
        run = jax.jit(lambda w, *a, cache=None: decoder.apply({"params": w}, *a, cache=cache, keep=True))
        _, cache = run(model.weights, ids_BT[:, :20], ones[:, :20], at[:, :20])
        held = sum(x.nbytes for x in jax.tree.leaves(cache.layers))
        outputs, _ = run(model.weights, ids_BT[:, 20:], ones[:, 20:], at[:, 20:], cache=cache.grown(24))
        return np.asarray(outputs.logits()), held

    (exact, wide), (near, narrow) = last("same"), last("int8")
    assert 0 < np.abs(near - exact).max() < 0.03 * np.abs(exact).max()
    H = model.blueprint.decoder.head
    assert narrow * 4 * H == wide * (H + 4)  # a byte a number, and four a head and token


def test_int8_past_keeps_greedy_texts_of_a_trained_model(assets):
    model = tuned.open_model(str(assets / "models" / "stories260K"))
    s = Sampling(max_new_tokens=32)
    prompts = ["Once upon a time", "One day, a girl named Lily"]
    plain, held = ([g.ids for g in m.generator.generate(prompts, s)] for m in (model, model.keeping("int8")))
    same = np.mean([a == b for x, y in zip(plain, held, strict=True) for a, b in zip(x, y, strict=False)])
    assert same > 0.9


def test_a_prefix_is_held_in_int8_too(tiny):
    model = tuned.open_model(str(tiny))
    c, r = model.blueprint.decoder, np.random.default_rng(2)
    k, v = r.normal(size=(2, c.layers, c.kv_heads, 3, c.head)).astype(np.float32)
    table = Prefix(model.weights["embed_tokens"]["weight"], k, v)
    weights = {**model.weights, "embed_tokens": {"weight": table}}
    ids_BT = r.integers(3, 290, (1, 8)).astype(np.int32)
    ones, at = np.ones_like(ids_BT), np.arange(8)[None]
    found = {}
    for kv in ("same", "int8"):
        decoder = Decoder(dataclasses.replace(c, kv=kv))
        outputs, cache = decoder.apply({"params": weights}, ids_BT, ones, at, keep=True)
        found[kv] = np.asarray(outputs.logits())
    assert jax.tree.leaves(cache.layers)[0].dtype == np.int8
    assert cache.segment_BS.shape == (1, 11)
    assert 0 < np.abs(found["int8"] - found["same"]).max() < 0.05 * np.abs(found["same"]).max()
