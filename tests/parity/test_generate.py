"""Texts and scores of a random LLaMA beside transformers': greedy, beams, end tokens, log-probabilities."""

import numpy as np
import pytest
import torch
import transformers

from jaxtune.generate import Sampling
from jaxtune.tuned import open_model
from tests.tiny import write_tiny

PROMPTS = [[5, 9, 33, 7], [11, 200, 3, 4, 90, 91, 17, 60, 8], [41, 42]]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A model of two layers whose weights are far apart, so that no two texts come near to a tie; ours and theirs."""
    folder = tmp_path_factory.mktemp("m") / "m"
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    write_tiny(folder)  # its tokenizer stays
    model.save_pretrained(folder)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return open_model(str(folder)).generator, model


def theirs(model, prompt, ends, **options):
    """New tokens, without what follows an end token."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, eos_token_id=ends, **options
    )
    return [until(row[len(prompt) :].tolist(), ends or []) for row in out]


def until(ids, ends):
    return next((ids[:i] for i, token in enumerate(ids) if token in ends), ids)


def ours(generator, s, ends):
    other = type(generator)(generator.model, generator.weights, generator.tokenizer, ends)
    return [g.ids for g in other.generate(PROMPTS, s)]


def test_greedy_for_64_tokens_and_log_probabilities(both):
    generator, model = both
    got = generator.generate(PROMPTS, Sampling(64))
    for prompt, g in zip(PROMPTS, got, strict=True):
        [want] = theirs(model, prompt, [2], max_new_tokens=64)
        assert g.ids == want
        with torch.no_grad():
            p = torch.log_softmax(model(torch.tensor([prompt + want])).logits[0].float(), -1)
        n = torch.arange(len(want))
        wanted = p[len(prompt) - 1 + n, torch.tensor(want)].numpy()
        np.testing.assert_allclose(g.logprobs, wanted, atol=2e-5)
        [scored] = generator.score([prompt], [want])
        np.testing.assert_allclose(scored, wanted, atol=2e-5)
    assert all(x.greedy for x in generator.judge(PROMPTS, [g.ids for g in got]))


@pytest.fixture(scope="module")
def ends(both):
    """Tokens that end some beams early: frequent ones of texts that are searched for."""
    found = [t for p in PROMPTS for t in theirs(both[1], p, None, max_new_tokens=12, num_beams=4)[0]]
    return sorted({found[5], found[7], found[30]})


@pytest.mark.parametrize(
    ("beams", "length_penalty", "early_stopping"),
    [(4, 1.0, False), *((3, penalty, early) for penalty in (0.0, 1.0, 2.5, -1.0) for early in (False, True))],
)
def test_beams(both, ends, beams, length_penalty, early_stopping):
    generator, model = both
    options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    got = ours(generator, Sampling(24, beams=beams, samples=beams, **options), ends)
    want = [
        ids
        for p in PROMPTS
        for ids in theirs(model, p, ends, max_new_tokens=24, num_beams=beams, num_return_sequences=beams, **options)
    ]
    assert got == want
    assert length_penalty > 2 or any(len(x) < 23 for x in got)  # some ended early


def test_beams_with_a_penalty_and_a_least_length(both, ends):
    generator, model = both
    s = Sampling(20, beams=3, repetition_penalty=1.3, min_new_tokens=9)
    options = {"repetition_penalty": 1.3, "min_new_tokens": 9, "num_beams": 3, "max_new_tokens": 20}
    assert ours(generator, s, ends) == [theirs(model, p, ends, **options)[0] for p in PROMPTS]


def test_one_beam_and_least_length(both, ends):
    generator, model = both
    for least in (0, 3, 11):
        want = [theirs(model, p, ends, max_new_tokens=20, min_new_tokens=least)[0] for p in PROMPTS]
        assert ours(generator, Sampling(20, min_new_tokens=least), ends) == want
        assert ours(generator, Sampling(20, min_new_tokens=least, stop_ids=tuple(ends)), []) == want
