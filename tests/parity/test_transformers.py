"""Logits of random LLaMAs beside transformers', for every feature of the family."""

import json

import numpy as np
import pytest
import torch
import transformers

from jaxtune.convert import write_model
from jaxtune.errors import UserError
from jaxtune.generate import Sampling, choose
from jaxtune.hf import tokenizer
from jaxtune.models import families
from jaxtune.tuned import open_model
from tests.tiny import write_tiny

ROPES = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn_mscale": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 16.0, "beta_slow": 2.0,
        "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip


def write(folder, rope=None, **config):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    own = {**sizes, "num_key_value_heads": 2, "max_position_embeddings": 64, **config}
    if rope:
        own["rope_parameters"] = {"rope_theta": 10000.0, **rope}
    c = transformers.LlamaConfig(**own)
    model = transformers.LlamaForCausalLM(c).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    write_tiny(folder)  # its tokenizer stays
    model.save_pretrained(folder)
    return model


def compare(model, folder, length, atol=1e-4):
    ids = np.random.default_rng(0).integers(3, 300, (2, length))
    with torch.no_grad():
        want = model(torch.tensor(ids)).logits.numpy()
    ours = open_model(str(folder))
    at = np.broadcast_to(np.arange(length), ids.shape)
    got = ours.blueprint.model.apply({"params": ours.weights}, ids, np.ones_like(ids), at)[0].logits()
    np.testing.assert_allclose(got, want, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("name", ROPES)
def test_rope(tmp_path, name):
    """Past the original context, too."""
    compare(write(tmp_path / "m", ROPES[name]), tmp_path / "m", 100)


@pytest.mark.parametrize(
    "config",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 16},
        {"rms_norm_eps": 1e-3, "rope_theta": 500000.0},
    ],
    ids=str,
)
def test_shapes(tmp_path, config):
    compare(write(tmp_path / "m", **config), tmp_path / "m", 20)


@pytest.mark.parametrize("name", ["llama3", "yarn", "linear"])
def test_both_dialects_of_config_are_one(tmp_path, name):
    write(tmp_path / "m", ROPES[name])
    new = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "rope_parameters" in new
    scaling = dict(new["rope_parameters"])
    old = {**{k: v for k, v in new.items() if k != "rope_parameters"}, "rope_theta": scaling.pop("rope_theta")}
    old["rope_scaling"] = {"type" if k == "rope_type" and name == "linear" else k: v for k, v in scaling.items()}
    assert families.from_hf(old) == families.from_hf(new)


def test_a_tokenizer_is_the_one_that_transformers_opens(tiny):
    ours, theirs = tokenizer.load(tiny), transformers.AutoTokenizer.from_pretrained(tiny)
    assert type(ours) is type(theirs)
    assert ours.init_kwargs == theirs.init_kwargs | {"model_max_length": ours.init_kwargs["model_max_length"]}
    text = "<s> the fox eats 12 berries</s>\n élan"
    assert ours(text).input_ids == theirs(text).input_ids


def test_greedy_generation_with_padding(tmp_path):
    model = write(tmp_path / "m", ROPES["llama3"])
    ours = open_model(str(tmp_path / "m"))
    prompts = ["the fox", "1 + 2 = 3 and the fox eats berries"]
    got = ours.generator.generate(prompts, Sampling(12))
    for p, g in zip(prompts, got, strict=True):
        ids = torch.tensor([ours.tokenizer(p, add_special_tokens=False).input_ids])
        out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=2)
        want = out[0, ids.shape[1] :].tolist()
        assert g.ids == (want[: want.index(2)] if 2 in want else want)


def test_logits_processors(tmp_path):
    """Penalty, temperature, top-k and top-p keep just the tokens that transformers keeps."""
    import jax
    import jax.numpy as jnp
    from transformers.generation import logits_process as lp

    rng = np.random.default_rng(0)
    logits, seen = rng.normal(size=(1, 50)).astype(np.float32) * 3, rng.integers(0, 50, (1, 9))
    scores = torch.tensor(logits)
    for processor in (
        lp.RepetitionPenaltyLogitsProcessor(1.3), lp.TemperatureLogitsWarper(0.7), lp.TopKLogitsWarper(12),
        lp.TopPLogitsWarper(0.8),
    ):  # fmt: skip
        scores = processor(torch.tensor(seen), scores)
    p = torch.softmax(scores, -1)[0].numpy()
    n = 20000
    mask = np.zeros((1, 50), bool)
    mask[0, seen[0]] = True
    drawn = choose(
        jnp.broadcast_to(logits, (n, 50)), jnp.broadcast_to(mask, (n, 50)), jax.random.split(jax.random.key(0), n),
        Sampling(temperature=0.7, top_k=12, top_p=0.8, repetition_penalty=1.3),
    )  # fmt: skip
    share = np.bincount(np.asarray(drawn), minlength=50) / n
    assert set(np.flatnonzero(share)) == set(np.flatnonzero(p))
    np.testing.assert_allclose(share, p, atol=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_we_write_transformers_opens(tmp_path, dtype):
    write(tmp_path / "m", ROPES["llama3"], tie_word_embeddings=True)
    write_model(str(tmp_path / "m"), tmp_path / "out", dtype=dtype)
    theirs, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == getattr(torch, dtype)
    compare(theirs.float(), tmp_path / "out", 20)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "lama"}, "model_type 'lama' is not supported; did you mean 'llama'"),
        ({"hidden_act": "relu2"}, "hidden_act 'relu2' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} is not supported"),
        ({"model_type": "gemma3"}, "'gemma3' is not supported: it reads more than text"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope' needs 4 numbers in short_factor, not 0"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope_type 'mrope' is not supported"),
        ({"hidden_size": None}, "key 'hidden_size' is missing"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tiny, change, words):
    c = {**json.loads((tiny / "config.json").read_text()), **change}
    with pytest.raises(UserError) as e:
        families.from_hf({k: v for k, v in c.items() if v is not None}, "m/config.json")
    assert words in str(e.value)
    assert "m/config.json" in str(e.value)
