"""Every family beside transformers: logits, hidden states by layer, gradients, generation, round trips."""

import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxtune import blueprint
from jaxtune.convert import write_model
from jaxtune.errors import UserError
from jaxtune.generate import Sampling
from jaxtune.hf import files, load
from jaxtune.models import families as ours
from jaxtune.tuned import open_model
from tests.parity.families import FAMILIES, V, make, write

T = 48  # past the original context of every scaled rope here


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family") / "m"
    model = write(folder, request.param)
    return model, open_model(str(folder)), folder


class Out(NamedTuple):
    logits: np.ndarray
    balance: Any


@functools.cache
def compiled(model):
    def f(weights, ids, segment, position):
        outputs = model.apply({"params": weights}, ids, segment, position)[0]
        return outputs.logits(), outputs.balance

    return jax.jit(f)


def run(opened, ids, segment=None, position=None):
    """Filled up to one shape, so that a model is compiled once."""
    B, length = ids.shape
    segment = np.ones_like(ids) if segment is None else segment
    position = np.broadcast_to(np.arange(length), ids.shape) if position is None else position
    columns = (np.pad(x, ((0, 2 - B), (0, T - length))) for x in (ids, segment, position))
    logits, balance = compiled(opened.blueprint.model)(opened.weights, *columns)
    return Out(np.asarray(logits)[:B, :length], balance)


def off(got, want):
    """The largest difference, on the scale of what is wanted."""
    got, want = np.asarray(got), np.asarray(want)
    return float(np.abs(got - want).max() / np.abs(want).max())


def plain(opened, ids, weights):
    at = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return opened.blueprint.model.apply({"params": weights}, ids, np.ones_like(ids), at)[0]


def by_layer(model, opened, ids):
    """For the message of a failure: how far the hidden states are off after each layer."""
    with torch.no_grad():
        states = model(torch.tensor(ids), output_hidden_states=True).hidden_states
    at = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    _, seen = opened.blueprint.model.apply(
        {"params": opened.weights}, ids, np.ones_like(ids), at, capture_intermediates=True, mutable=["intermediates"]
    )
    c = opened.blueprint.decoder
    after_LBTD = seen["intermediates"][f"layers_0-{c.layers - 1}"]["__call__"][0][0]
    told = [
        f"layer {i}: {off(x, states[i + 1]):.1e}" for i, x in enumerate(after_LBTD[:-1])
    ]  # the last is normed there
    return ", ".join(told)


def test_logits(case):
    model, opened, _ = case
    ids = np.random.default_rng(0).integers(3, V, (2, T))
    with torch.no_grad():
        want = model(torch.tensor(ids)).logits.numpy()
    got = run(opened, ids).logits
    assert off(got, want) < 2e-5, by_layer(model, opened, ids)


@pytest.mark.parametrize("case", ["gemma3", "qwen3_moe"], indirect=True)
def test_it_can_tell_which_layer_differs(case):
    model, opened, _ = case
    ids = np.random.default_rng(0).integers(3, V, (1, T))
    told = [float(x.split(": ")[1]) for x in by_layer(model, opened, ids).split(", ")]
    assert len(told) == 2
    assert max(told) < 1e-4


def test_gradients(case):
    """Of the loss with respect to every weight, within 1e-4 on the scale of that weight's gradient."""
    model, opened, _ = case
    ids = np.random.default_rng(1).integers(3, V, (2, T))
    labels = torch.tensor(ids)
    model.zero_grad()
    model(labels, labels=labels).loss.backward()
    b = opened.blueprint

    def loss(weights):
        logp = jax.nn.log_softmax(plain(opened, ids, weights).logits()[:, :-1])
        return -jnp.take_along_axis(logp, ids[:, 1:, None], -1).mean()

    grads = blueprint.boxed(b, jax.jit(jax.grad(loss))(opened.weights))
    got = {n: e.data() for n, e in files.entries(grads, np.dtype("float32"), b.decoder.family).items()}
    want = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    want = in_file_names(want, b.decoder.family)
    assert set(want) == set(got)
    for n, g in want.items():
        assert off(got[n], g) < 1e-4, n


def in_file_names(named, family):
    """Transformers' parameters as its files have them: experts one by one."""
    out = {}
    for n, x in named.items():
        experts = ours.FAMILIES[family].experts
        if experts is not None:
            n = n.replace(".mlp.", f".{experts.block}.")
        if ".experts." not in n:
            out[n] = x
            continue
        module, matrix = n.rsplit(".", 1)
        for e, w in enumerate(x):
            names = (experts.gate, experts.up) if matrix == "gate_up_proj" else (experts.down,)
            out |= {f"{module}.{e}.{p}.weight": y for p, y in zip(names, np.split(w, len(names)), strict=True)}
    return out


def test_greedy_generation_of_64_tokens(case):
    """Each token is what transformers finds likeliest after those before it, so its own greedy text is the same."""
    model, opened, _ = case
    stepwise = any(r is not None and r.kind == "longrope" for r in opened.blueprint.decoder.ropes)
    prompts = ["the fox", "1 + 2 = 3 and the fox eats berries"]
    got = opened.generator.generate(prompts, Sampling(64))
    for p, g in zip(prompts, got, strict=True):
        prompt = opened.tokenizer(p, add_special_tokens=False).input_ids
        ended = [2] * (len(g.ids) < 64)
        with torch.no_grad():
            if stepwise:  # its angles are those of the text's length at each step
                out = model.generate(
                    torch.tensor([prompt]), max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=2
                )
                want = out[0, len(prompt) :].tolist()
            else:
                likeliest = model(torch.tensor([prompt + g.ids])).logits[0].argmax(-1).tolist()
                want = likeliest[len(prompt) - 1 :][: len(g.ids + ended)]
        assert g.ids + ended == want


@pytest.mark.parametrize("prompt", [9, 15, 16, 17])
def test_longrope_reads_again_where_its_factors_change(tmp_path, prompt):
    """Log-probabilities of 16 tokens around the original context of 16; other rows of the batch change nothing."""
    model = write(tmp_path / "m", "phi4_mini")
    opened = open_model(str(tmp_path / "m"))
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, V, prompt).tolist(), rng.integers(3, V, 5).tolist()]
    got = opened.generator.generate(prompts, Sampling(16, min_new_tokens=16))[0]
    out = model.generate(
        torch.tensor([prompts[0]]), max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0,
        eos_token_id=2, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert got.ids == out.sequences[0, prompt:].tolist()
    logp = torch.log_softmax(torch.stack(out.logits)[:, 0], -1).numpy()
    np.testing.assert_allclose(got.logprobs, logp[np.arange(16), got.ids], atol=2e-5)
    with pytest.raises(UserError, match="where LongRoPE changes its factors"):
        opened.generator.generate([prompts[1]], Sampling(16, beams=2))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported in this family"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "are both there"),
        ("gemma3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is not supported in gemma3_text"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "in some layers only is not supported"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not supported"),
        ("ministral", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention is not supported"),
    ],
)
def test_what_would_change_the_logits_is_refused(name, change, words):
    given = {**make(name).config.to_dict(), **change}
    with pytest.raises(UserError, match=words):
        ours.from_hf(given)


def test_packed_is_unpacked(case):
    _, opened, _ = case
    rng = np.random.default_rng(2)
    a, b = rng.integers(3, V, (1, 29)), rng.integers(3, V, (1, 13))
    segment = np.array([[1] * 29 + [2] * 13 + [0] * 6])
    position = np.array([[*range(29), *range(13), *[0] * 6]])
    packed = np.asarray(run(opened, np.concatenate([a, b, np.zeros((1, 6), int)], 1), segment, position).logits)
    assert off(packed[:, :29], run(opened, a).logits) < 2e-5
    assert off(packed[:, 29:42], run(opened, b).logits) < 2e-5


def test_no_token_sees_what_comes_after_it(case):
    _, opened, _ = case
    rng = np.random.default_rng(3)
    ids = rng.integers(3, V, (1, T))
    want = np.asarray(run(opened, ids).logits)
    c = opened.blueprint.decoder
    for t in (0, 5, T // 2, T - 2):
        changed = ids.copy()
        changed[:, t + 1 :] = rng.integers(3, V, (1, T - t - 1))
        got = np.asarray(run(opened, changed).logits)
        if not any(r is not None and r.kind in ("dynamic", "longrope") for r in c.ropes):
            np.testing.assert_array_equal(got[:, : t + 1], want[:, : t + 1])
        assert off(got[:, : t + 1], want[:, : t + 1]) < 1e-5
        assert off(got[:, t + 1 :], want[:, t + 1 :]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_round_trip_is_exact(tmp_path, name, dtype):
    """Every tensor in its own dtype under its own name, every other file byte for byte."""
    write(tmp_path / "m", name, dtype)
    (tmp_path / "m" / "LICENSE").write_text("as is")
    write_model(str(tmp_path / "m"), tmp_path / "out")
    before, after = load.read_folder(tmp_path / "m"), load.read_folder(tmp_path / "out")
    assert set(before) == set(after)
    for n, t in before.items():
        assert t.dtype == after[n].dtype
        np.testing.assert_array_equal(t.open().view(np.uint8), after[n].open().view(np.uint8))
    others = {f.name for f in (tmp_path / "m").iterdir() if not f.name.endswith(".safetensors")}
    assert others | {"README.md"} == {
        f.name for f in (tmp_path / "out").iterdir() if not f.name.endswith(".safetensors")
    }
    for f in others:
        assert (tmp_path / "m" / f).read_bytes() == (tmp_path / "out" / f).read_bytes()
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_config_json_both_ways(case):
    """What is written from our config, transformers reads as the same model and we as the same config."""
    model, _, folder = case
    c = ours.from_hf(json.loads((folder / "config.json").read_text()))
    written = ours.to_hf(c)
    assert ours.from_hf(written) == c
    again = transformers.AutoConfig.for_model(
        **{k: v for k, v in written.items() if k != "architectures"}, pad_token_id=0
    )
    other = type(model)(again).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    ids = torch.tensor(np.random.default_rng(0).integers(3, V, (1, T)))
    with torch.no_grad():
        assert off(other(ids).logits, model(ids).logits) < 1e-5


@pytest.mark.parametrize("name", ["llama", "llama3", "gemma3", "phi4_mini", "olmo3", "smollm3"])
def test_far_positions(tmp_path, name):
    """What stands far out has the angles that transformers gives it."""
    model = write(tmp_path / "m", name)
    opened = open_model(str(tmp_path / "m"))
    ids = np.random.default_rng(0).integers(3, V, (2, T))
    for start in (1000, 8192):
        at = start + np.broadcast_to(np.arange(T), ids.shape)
        with torch.no_grad():
            want = model(torch.tensor(ids), position_ids=torch.tensor(at)).logits.numpy()
        assert off(run(opened, ids, position=at).logits, want) < 2e-5
