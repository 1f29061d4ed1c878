import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import cli, decoding
from jaxtune.errors import UserError
from jaxtune.generate import Sampling, choose
from jaxtune.tuned import open_model
from tests.tiny import on_eight_devices, write_jsonl, write_tiny

PROMPTS = ["the fox", "1 + 2 =", "the fox eats berries and the fox eats"]


@pytest.fixture(scope="module")
def model(tiny):
    return open_model(str(tiny))


@pytest.fixture(scope="module")
def generator(model):
    return model.generator


def full_forward(generator, prompt, n):
    """Greedy tokens by a whole forward pass for each, without a cache."""
    ids = generator.tokenizer(prompt, add_special_tokens=False).input_ids
    start = len(ids)
    apply = jax.jit(
        lambda x, p: generator.model.apply({"params": generator.weights}, x, jnp.ones_like(x), p)[0].logits()
    )
    for _ in range(n):
        padded = jnp.array([ids + [0] * (64 - len(ids))])
        ids.append(int(apply(padded, jnp.arange(64)[None])[0, len(ids) - 1].argmax()))
    return ids[start:]


def test_the_cache_changes_nothing(generator):
    for p in PROMPTS:
        assert generator.generate([p], Sampling(20))[0].ids == full_forward(generator, p, 20)


@pytest.mark.parametrize("s", [Sampling(20), Sampling(20, temperature=1.0, top_p=0.9, seed=3, repetition_penalty=1.2)])
def test_batches_give_the_same_text_as_one_by_one(generator, s):
    together = generator.generate(PROMPTS, s)
    assert [g.ids for g in together] == [generator.generate([p], s)[0].ids for p in PROMPTS]


def test_streaming_gives_the_same_text(generator):
    s = Sampling(20, temperature=0.8, seed=1)
    pieces = list(generator.stream(PROMPTS[0], s))
    assert len(pieces) > 1
    assert "".join(pieces) == generator.generate([PROMPTS[0]], s)[0].text


def test_seeds(generator):
    def text(seed):
        return generator.generate([PROMPTS[0]], Sampling(20, temperature=1.0, seed=seed))[0].ids

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_stop_strings_end_and_are_cut(generator):
    whole = generator.generate([PROMPTS[0]], Sampling(20))[0]
    stop = whole.text[4:7]
    cut = generator.generate([PROMPTS[0]], Sampling(20, stop=(stop,)))[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish == "stop"
    assert whole.finish == "length"
    assert len(whole.ids) == 20
    assert "".join(generator.stream(PROMPTS[0], Sampling(20, stop=(stop,)))) == cut.text


def test_the_end_token_ends(generator):
    first = generator.generate([PROMPTS[0]], Sampling(3))[0].ids
    other = type(generator)(generator.model, generator.weights, generator.tokenizer, [first[1]])
    g = other.generate([PROMPTS[0]], Sampling(8))[0]
    assert g.ids == first[:1] or first[0] == first[1]
    assert g.finish == "stop"


def draws(logits, s, n=400):
    keys = jax.random.split(jax.random.key(0), n)
    wide = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, len(logits)))
    return np.asarray(choose(wide, jnp.zeros(wide.shape, bool), keys, s))


LOGITS = np.log([0.5, 0.25, 0.15, 0.1])


def test_sampling_follows_the_distribution():
    share = np.bincount(draws(LOGITS, Sampling(temperature=1.0), 4000), minlength=4) / 4000
    np.testing.assert_allclose(share, [0.5, 0.25, 0.15, 0.1], atol=0.03)


@pytest.mark.parametrize(
    ("s", "allowed"),
    [
        (Sampling(temperature=1.0, top_k=1), {0}),
        (Sampling(temperature=1.0, top_k=2), {0, 1}),
        (Sampling(temperature=1.0, top_p=0.4), {0}),
        (Sampling(temperature=1.0, top_p=0.7), {0, 1}),
        (Sampling(temperature=1.0, top_p=0.9001), {0, 1, 2, 3}),
        (Sampling(temperature=0.01), {0}),
    ],
)
def test_truncated_sampling_keeps_what_it_should(s, allowed):
    assert set(draws(LOGITS, s).tolist()) == allowed


def test_the_penalty_makes_seen_tokens_less_likely():
    logits = jnp.array([[2.0, 1.5, -1.0]])
    seen = jnp.array([[True, False, False]])
    key = jax.random.split(jax.random.key(0), 1)
    assert int(choose(logits, seen, key, Sampling())[0]) == 0
    assert int(choose(logits, seen, key, Sampling(repetition_penalty=1.5))[0]) == 1


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_new_tokens": 0}])
def test_bad_options_are_named(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)


def test_an_empty_prompt(generator):
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generator.generate([""])


DRAWN = Sampling(12, temperature=1.0, seed=5)


def test_samples_are_prompt_by_prompt_and_begin_with_the_only_one(generator):
    alone = generator.generate(PROMPTS, DRAWN)
    three = generator.generate(PROMPTS, Sampling(12, temperature=1.0, seed=5, samples=3))
    assert [g.ids for g in three[::3]] == [g.ids for g in alone]
    assert len({tuple(g.ids) for g in three}) == 9
    assert [g.ids for g in three[3:6]] == [
        g.ids for g in generator.generate(PROMPTS[1:2], Sampling(12, temperature=1.0, seed=5, samples=3))
    ]


def test_log_probabilities_are_the_models_own(generator):
    s = Sampling(12, temperature=0.7, top_k=5, repetition_penalty=1.3, seed=2)
    got = generator.generate(PROMPTS, s)
    scores = generator.score([generator.tokenizer(p).input_ids[1:] for p in PROMPTS], [g.ids for g in got])
    for g, want in zip(got, scores, strict=True):
        assert len(g.logprobs) == len(g.ids)
        np.testing.assert_allclose(g.logprobs, want, atol=1e-4)


def test_scores_keep_the_order_and_do_not_mix(generator):
    prompts = [*PROMPTS, "the fox"]
    ends = [" eats", " 3", " berries and more", ""]
    together = generator.score(prompts, ends, batch_size=3)
    assert together[3] == []
    for p, e, got in zip(prompts, ends, together, strict=True):
        np.testing.assert_allclose(generator.score([p], [e])[0], got, atol=1e-5)


def test_beams_are_rows_that_do_not_mix(generator):
    s = Sampling(12, beams=3, samples=2)
    together = generator.generate(PROMPTS, s)
    assert len(together) == 6
    alone = [g for p in PROMPTS for g in generator.generate([p], s)]
    assert [g.ids for g in together] == [g.ids for g in alone]
    for g in together:
        assert len(g.logprobs) == len(g.ids)


def test_stop_ids_end_and_are_cut_off(generator):
    first = generator.generate([PROMPTS[0]], Sampling(8))[0].ids
    end = first[3]
    g = generator.generate([PROMPTS[0]], Sampling(8, stop_ids=(end,)))[0]
    assert (g.ids, g.finish) == (first[: first.index(end)], "stop")
    later = generator.generate([PROMPTS[0]], Sampling(8, stop_ids=(end,), min_new_tokens=8))[0]
    assert (len(later.ids), later.finish) == (8, "length")
    assert end not in later.ids


def test_the_context_is_the_end(generator):
    """128 tokens, in the tiny model."""
    long = [7] * 120
    short, cut = generator.generate([[7] * 5, long], Sampling(20))
    assert (len(short.ids), short.finish) == (20, "length")
    assert (len(cut.ids), cut.finish) == (8, "length")
    [best] = generator.generate([long], Sampling(20, beams=2))
    assert (len(best.ids), best.finish) == (8, "length")
    with pytest.raises(UserError, match="prompt 2 has 128 tokens; the model's context is 128.*shorten"):
        generator.generate([long, [7] * 128], Sampling(20))
    with pytest.raises(UserError, match="prompt 1 and its completion have 130 tokens; the model's context is 128"):
        generator.score([long], [[7] * 10])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"beams": 3, "temperature": 0.5}, "temperature=0.5 should be 0 with beams=3"),
        ({"beams": 2, "samples": 3}, "samples=3 should be at most beams=2"),
        ({"samples": 3}, "raise temperature or beams"),
    ],
)
def test_options_that_do_not_go_together(bad, words):
    with pytest.raises(UserError, match=words):
        Sampling(**bad)


def test_streaming_is_of_one_text(generator):
    with pytest.raises(UserError, match="beams=2 should be 1"):
        next(generator.stream(PROMPTS[0], Sampling(beams=2)))


def test_lengths_and_batches_of_one_bucket_compile_once(generator):
    generator.generate([[5] * 7] * 8, Sampling(17))
    before = decoding.prefill._cache_size(), decoding.decode._cache_size()
    generator.generate([[5] * 40] * 5, Sampling(20))
    assert (decoding.prefill._cache_size(), decoding.decode._cache_size()) == before


def test_predict_writes_samples_and_log_probabilities(tiny, tmp_path):
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": p, "completion": "x"} for p in PROMPTS])
    command = ["predict", str(tiny), str(file), "--max-new-tokens", "4", "--logprobs", "--out"]
    for name, more in (("one", []), ("two", ["--samples", "2", "--beams", "2"])):
        with pytest.raises(SystemExit) as e:
            cli.main([*command, str(tmp_path / name), *more])
        assert not e.value.code
    one, two = ([json.loads(x) for x in (tmp_path / n).read_text().splitlines()] for n in ("one", "two"))
    assert [set(x) for x in one] == [{"prompt", "prediction", "finish", "reference", "logprobs"}] * 3
    assert [set(x) for x in two] == [{"prompt", "predictions", "finish", "reference", "logprobs"}] * 3
    assert [len(x["predictions"]) for x in two] == [2, 2, 2]
    assert [len(x["logprobs"]) for x in one] == [4, 4, 4]


MESHED = """
import json, sys
import jax
from jaxtune import config
from jaxtune.generate import Sampling
from jaxtune.tuned import open_model
assert jax.device_count() == 8
prompts, out = json.loads(sys.argv[2]), []
for shape, wanted in (({"data": 2, "fsdp": 2, "tensor": 2}, (1, 2)), ({"fsdp": 2, "tensor": 4}, (1,))):
    t = open_model(sys.argv[1], mesh=config.Mesh(**shape))
    with jax.set_mesh(t.mesh):
        for beams in wanted:
            out.append([g.ids for g in t.generator.generate(prompts, Sampling(12, beams=beams))])
        read, d = t.generator._read(prompts, Sampling(12), 1)
    out.append(str(jax.tree.leaves(d.cache.layers)[0].sharding.spec))
print("FOUND", json.dumps(out))
"""


def test_a_mesh_gives_the_same_texts(tmp_path):
    """Of a cache that is split: rows over data and fsdp, heads over tensor, where they divide."""
    folder = write_tiny(tmp_path / "m", seed=3)
    prompts = [*PROMPTS, "2 + 2 ="]
    ran = on_eight_devices(MESHED, folder, json.dumps(prompts))
    greedy, beams, split, again, whole_heads = json.loads(ran.stdout.split("FOUND")[1])
    generator = open_model(str(folder)).generator
    assert greedy == again == [g.ids for g in generator.generate(prompts, Sampling(12))]
    assert beams == [g.ids for g in generator.generate(prompts, Sampling(12, beams=2))]
    assert "('data', 'fsdp'), 'tensor'" in split
    assert "'fsdp'" in whole_heads
    assert "tensor" not in whole_heads  # two heads over four
