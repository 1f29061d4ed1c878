"""Rows that come and go say what they would say alone."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from jaxtune.generate import Generator, Sampling
from jaxtune.layers import Rope
from jaxtune.models.decoder import Decoder
from jaxtune.nodes.soft_prompt import Prefix, SoftPrompt
from jaxtune.serve.inference import batch
from jaxtune.serve.inference.batch import Batch, Choice, Row
from jaxtune.tuned import open_model

PROMPTS = ["the fox", "1 + 2 =", "the fox eats berries and the fox eats", "3 + 4 = 7, 4 + 4 = 8", "berries"]
GREEDY = Choice(*map(np.float32, (0, 1, 0, 0)), None)
WARM = Choice(*map(np.float32, (1.0, 0.9, 0, 0)), None)


@pytest.fixture(scope="module")
def generator(tiny):
    return open_model(str(tiny)).generator


def row(g, prompt, limit=20, choice=GREEDY, seed=0, sample=0):
    return Row(prompt, g.encode(prompt), limit, choice, seed, sample, False)


def finish(b, after=None):
    """Step until all rows have what they want; `after` is called between two steps."""
    made = {}
    while b.busy:
        for r, tokens in b.step():
            made.setdefault(id(r), []).extend(t.id for t in tokens)
            if len(r.new) == r.limit:
                b.drop(r)
        if after is not None:
            after(b)
    return made


def alone(g, **options):
    one = row(g, **options)
    b = Batch(g, 2**30)
    b.add(one)
    finish(b)
    return one.new


def wanted(g, prompts, **options):
    """What `Generator` says, ended by length alone."""
    endless = Generator(g.model, g.weights, g.tokenizer, ())
    return [x.ids for x in endless.generate(prompts, Sampling(**options))]


@pytest.mark.parametrize(("choice", "options"), [(GREEDY, {}), (WARM, {"temperature": 1.0, "top_p": 0.9, "seed": 5})])
def test_rows_that_come_and_go_are_as_the_generator_has_them(generator, choice, options):
    g, b = generator, Batch(generator, 2**30)
    rows = [row(g, p, 34 - 6 * i, choice, 5) for i, p in enumerate(PROMPTS)]
    later = rows[1:]
    b.add(rows[0])

    def come(b):
        if later:
            b.add(later.pop(0))

    finish(b, come)
    for r, want in zip(rows, wanted(g, PROMPTS, max_new_tokens=34, **options), strict=True):
        assert r.new == want[: r.limit], r.owner
    assert b.state is None


def test_samples_of_a_prompt_are_the_generators(generator):
    g, b = generator, Batch(generator, 2**30)
    rows = [row(g, PROMPTS[0], 12, WARM, 7, sample) for sample in range(3)]
    for r in rows:
        b.add(r)
    finish(b)
    assert [r.new for r in rows] == wanted(
        g, PROMPTS[:1], max_new_tokens=12, temperature=1.0, top_p=0.9, seed=7, samples=3
    )


def test_rows_of_other_settings_change_nothing(generator):
    g, V = generator, generator.model.c.rows
    bias = np.zeros(V, np.float32)
    bias[65] = 100
    kinds = [GREEDY, WARM, WARM._replace(top_p=np.float32(1)), GREEDY._replace(bias=bias)]
    kinds.append(GREEDY._replace(presence=np.float32(2), frequency=np.float32(2)))
    b, rows = Batch(g, 2**30), [row(g, PROMPTS[0], 12, c, 3) for c in kinds]
    for r in rows:
        b.add(r)
    finish(b)
    for r, c in zip(rows, kinds, strict=True):
        assert r.new == alone(g, prompt=PROMPTS[0], limit=12, choice=c, seed=3)
    assert rows[3].new == [65] * 12
    assert len(set(rows[4].new)) > len(set(rows[0].new))


SEEDED = {"temperature": 1.0, "top_p": 0.9, "seed": 5}


def many(g, limit):
    """Rows of short prompts and a long one, who come when there are less than two."""
    rows = [row(g, p, limit, WARM, 5) for p in PROMPTS]
    rows.insert(3, Row([7] * 80, [7] * 80, limit, WARM, 5, 0, False))
    b, later, lengths = Batch(g, 2**30), rows[2:], []
    for r in rows[:2]:
        b.add(r)

    def come(b):
        lengths.append(b.length)
        if later and sum(r is not None for r in b.rows) < 2:
            b.add(later.pop(0))

    finish(b, come)
    return rows, lengths


def check(g, rows):
    """They say what they say alone."""
    for r, want in zip(rows, wanted(g, [r.owner for r in rows], max_new_tokens=rows[0].limit, **SEEDED), strict=True):
        assert r.new == want, r.owner


def test_places_run_out_and_rows_move(generator):
    """Each of 192 places is used again, with a long prompt in between that wants more of them at once."""
    rows, lengths = many(generator, 48)
    check(generator, rows)
    assert max(lengths) <= 192
    assert any(after < before - 30 for before, after in itertools.pairwise(lengths))


def test_a_small_room_makes_rows_wait(generator):
    g, b = generator, Batch(generator, 1)
    rows = [row(g, p, 5) for p in PROMPTS[:3]]
    for r in rows:
        b.add(r)
    most = []
    finish(b, lambda b: most.append(len(b.rows)))
    assert max(most) == 1
    assert [r.new for r in rows] == wanted(g, PROMPTS[:3], max_new_tokens=5)


def test_log_probabilities_are_the_models_own(generator):
    g, b = generator, Batch(generator, 2**30)
    one = Row(None, g.encode(PROMPTS[0]), 6, WARM._replace(frequency=np.float32(1)), 1, 0, True)
    b.add(one)
    tokens = []
    while len(one.new) < 6:
        tokens += [t for _, made in b.step() for t in made]
    scored = g.judge([g.encode(PROMPTS[0])], [one.new])[0].logprobs
    np.testing.assert_allclose([t.logprob for t in tokens], scored, atol=1e-4)
    for t in tokens:
        values = [p for _, p in t.top]
        assert len(values) == batch.LIKELIEST
        assert values == sorted(values, reverse=True)
        assert t.logprob <= values[0]
        assert dict(t.top).get(t.id, t.logprob) == t.logprob


def test_dropped_rows_leave_the_others_as_they_are(generator):
    g, b = generator, Batch(generator, 2**30)
    rows = [row(g, p, 20) for p in PROMPTS[:3]]
    for r in rows:
        b.add(r)
    b.step()
    b.drop(rows[0])
    finish(b)
    assert len(rows[0].new) < 20
    assert [r.new for r in rows[1:]] == wanted(g, PROMPTS[1:3], max_new_tokens=20)
    assert jax.tree.leaves(b.state) == []


def noise(*shape):
    return jax.random.normal(jax.random.key(9), shape)


def special(g, kind):
    """The model with a prefix or virtual tokens, and windows; or with LongRoPE that turns otherwise after 32 tokens."""
    c, weights = g.model.c, g.weights
    embed = weights["embed_tokens"]["weight"]
    if kind == "longrope":
        turn = Rope(8, kind="longrope", context=32, factor=4.0, short_factor=(1.0,) * 4, long_factor=(1, 2, 3, 4.0))
        c = dataclasses.replace(c, ropes=(turn,))
    else:
        kv = [noise(c.layers, c.kv_heads, 3, c.head)] * 2
        node = Prefix(embed, *kv) if kind == "prefix" else SoftPrompt(embed, noise(3, c.embed))
        c = dataclasses.replace(c, windows=(0, 6))
        weights = {**weights, "embed_tokens": {"weight": node}}
    return Generator(Decoder(c), weights, g.tokenizer, ())


@pytest.mark.parametrize("kind", ["prefix", "prompt", "longrope"])
def test_models_that_are_not_like_others(generator, kind):
    g = special(generator, kind)
    rows, _ = many(g, 40)
    check(g, rows)
    if kind == "longrope":
        assert g.switch == 32  # which all rows pass, or begin behind
    else:
        assert rows[0].new != alone(generator, prompt=PROMPTS[0], limit=40, choice=WARM, seed=5)
