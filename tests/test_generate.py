import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.errors import UserError
from jaxtune.generate import Sampling, choose
from jaxtune.tuned import open_model

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
