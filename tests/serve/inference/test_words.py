"""Tokens become text as they come."""

import itertools

import numpy as np
import pytest

from jaxtune.generate import Sampling
from jaxtune.serve.inference.words import Speller, Text
from jaxtune.tuned import open_model


@pytest.fixture(scope="module")
def generator(tiny):
    return open_model(str(tiny)).generator


def pieces(g, prompt, ids, stop=()):
    """What is told after each token, and at the end."""
    text, told = Text(g.tokenizer, g.encode(prompt), stop), []
    for i in ids:
        if not text.stopped:
            text.push(i)
            told.append(text.text[: text.sure(False)])
    text.end()
    return [*told, text.text[: text.sure(True)]]


@pytest.mark.parametrize("seed", range(4))
def test_pieces_are_the_whole_text_even_of_broken_characters(generator, seed):
    """Random tokens are bytes of half characters more often than not."""
    ids = np.random.default_rng(seed).integers(3, len(generator.tokenizer), 60).tolist()
    told = pieces(generator, "the fox", ids)
    whole = generator.tokenizer.decode(generator.encode("the fox") + ids)
    assert "the fox" + told[-1] == whole
    for short, long in itertools.pairwise(told):
        assert long.startswith(short)


def test_a_character_of_several_tokens_comes_whole(generator):
    ids = generator.encode("é漢🦊")
    assert len(ids) > 6
    told = pieces(generator, "x", ids)
    assert told[-1] == "é漢🦊"
    assert {"".join(t) for t in told} == {"", "é", "é漢", "é漢🦊"}


def test_stop_strings_over_token_borders_are_never_told(generator):
    made = generator.generate(["the fox"], Sampling(20))[0]
    stop = made.text[4:9]
    told = pieces(generator, "the fox", made.ids, (stop, "never"))
    want = generator.generate(["the fox"], Sampling(20, stop=(stop,)))[0]
    assert told[-1] == want.text
    assert all(want.text.startswith(t) for t in told)


def test_tokens_alone_have_the_bytes_of_their_text(generator):
    spell = Speller(generator.tokenizer)
    for text in ("the fox é", "漢🦊"):
        assert bytes(b for i in generator.encode(text) for b in spell(i)[1]).decode() == text
