"""Answers chosen by their likelihood: beside the plain scores of each, cut prompts, ends, many answers."""

import numpy as np
import pytest
from scipy.special import logsumexp

from jaxtune import likelihood, tuned
from jaxtune.errors import UserError

PROMPTS = ["1 + 2 =", "the fox eats berries and the fox", "a"]
ANSWERS = [[" 3", " 33", " fox"], [" eats"], [f" {i} + {i}" for i in range(11)]]


@pytest.fixture(scope="module")
def generator(tiny):
    return tuned.open_model(str(tiny)).generator


@pytest.fixture(scope="module")
def apart(generator):
    """What `score` gives for each answer alone."""
    return [generator.score([p] * len(a), a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]


def test_values_are_those_of_each_answer_alone(generator, apart):
    got, cut = likelihood.choose(generator, PROMPTS, ANSWERS, closed=False)
    assert cut == 0
    for choices, alone in zip(got, apart, strict=True):
        np.testing.assert_allclose([c.logprob for c in choices], [sum(x) for x in alone], atol=1e-4)
        assert [c.tokens for c in choices] == [len(x) for x in alone]


def test_closed_adds_the_end(generator, apart):
    got, _ = likelihood.choose(generator, PROMPTS, ANSWERS, closed=True)
    closing = [
        [
            logsumexp([generator.score([generator.encode(p + a)], [[e]])[0][0] for e in generator.eos])
            for a in answers[:2]
        ]
        for p, answers in zip(PROMPTS, ANSWERS, strict=True)
    ]
    for choices, alone, ends in zip(got, apart, closing, strict=True):
        for c, x, end in zip(choices, alone, ends, strict=False):
            assert c.logprob == pytest.approx(sum(x) + end, abs=1e-4)


def test_of_an_answer_and_its_beginning_either_can_win(generator):
    """Without the end the beginning always does."""
    texts = ["7", "77", "777"]
    [got], _ = likelihood.choose(generator, ["the fox"], [texts], closed=False)
    assert [c.tokens for c in got] == [1, 2, 3]
    assert got[0].logprob > got[1].logprob > got[2].logprob
    [closed], _ = likelihood.choose(generator, ["the fox"], [texts], closed=True)
    assert logsumexp([c.logprob for c in closed]) < 0  # different answers: together no more than certain


def test_long_prompts_lose_their_middle(generator):
    long = "the fox eats berries " * 40
    got, cut = likelihood.choose(generator, [long], [["fox", "f"]], closed=True)
    assert cut == 1
    assert np.isfinite([c.logprob for c in got[0]]).all()
    with pytest.raises(UserError, match="no room for its answers"):
        likelihood.choose(generator, ["a"], [["fox " * 200]], closed=True)
    with pytest.raises(UserError, match="empty answer"):
        likelihood.choose(generator, ["a"], [["", "b"]], closed=True)
