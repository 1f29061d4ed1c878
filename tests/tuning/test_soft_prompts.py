import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import blueprint, cli, config, convert, run, steps, tuning
from jaxtune import job as jobs
from jaxtune.errors import UserError
from jaxtune.generate import Sampling
from jaxtune.layers import unbox
from jaxtune.nodes import soft_prompt
from jaxtune.nodes.soft_prompt import Prefix, SoftPrompt
from jaxtune.objectives import OBJECTIVES
from jaxtune.tuned import open_model
from jaxtune.tuning import method as m
from jaxtune.weights import densify, take
from tests.tiny import make_config, write_jsonl, write_tiny

V = 3
PROMPT = {"method": "prompt", "tokens": V}
PREFIX = {"method": "prefix", "tokens": V}
MLP = {**PROMPT, "encoder": "mlp", "encoder_hidden": 6}


@pytest.fixture(scope="module")
def made(tiny, sums_file, tmp_path_factory):
    """A job and its first weights, by tuning and config; the values that train are moved."""

    def make(t, **changes):
        job = jobs.prepare(
            make_config(tiny, sums_file, tmp_path_factory.mktemp("job") / "r", tuning=t, data__max_length=64, **changes)
        )
        weights = unbox(blueprint.materialise(job.blueprint, jax.random.key(0)))
        noise = jax.random.key(1)
        trained = jax.tree.map(
            lambda x, on: x + 0.3 * jax.random.normal(noise, x.shape) if on != m.FROZEN else x,
            weights,
            job.blueprint.labels,
        )
        return job, weights, trained

    return make


def loss(job, weights, objective="sft"):
    """Summed over all rows of the data."""
    rows = [job.data.train.lay_out(i) for i in range(len(job.data.train))]
    batch = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
    apply = steps.apply_of(job.blueprint)
    total, count, _ = jax.jit(lambda w, b: OBJECTIVES[objective](apply(w, b), b))(weights, batch)
    return float(total), int(count)


# --- data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [PROMPT, PREFIX], ids=["prompt", "prefix"])
def test_packed_texts_have_the_loss_of_single_ones(made, t):
    packed, _, weights = made(t)
    single, _, _ = made(t, data__packing=False)
    assert len(packed.data.train) < len(single.data.train)
    got, want = loss(packed, weights), loss(single, weights)
    assert got[1] == want[1]
    assert got[0] == pytest.approx(want[0], rel=1e-5)


def test_every_text_starts_with_the_virtual_tokens(made):
    job, *_ = made(PROMPT, vocabulary__multiple=64, data__validation=8)
    assert job.blueprint.decoder.rows == 320
    for rows in (job.data.train, job.data.validation):
        assert all(e.ids[:V].tolist() == [320, 321, 322] and not e.mask[:V].any() for e in rows.examples)
        assert max(rows.lay_out(0)["position_BT"]) > V


def test_pieces_of_a_document_too_and_only_text_is_predicted(tiny, tmp_path):
    file = write_jsonl(tmp_path / "d.jsonl", [{"text": "the fox eats berries " * 8}])
    c = make_config(tiny, file, tmp_path / "r", tuning=PROMPT, objective="pretrain", data__max_length=16)
    job = jobs.prepare(c)
    lengths = [len(e.ids) for e in job.data.train.examples]
    assert max(lengths) == 16
    assert all(e.ids[:V].tolist() == [300, 301, 302] for e in job.data.train.examples)
    weights = unbox(blueprint.materialise(job.blueprint, jax.random.key(0)))
    total, count = loss(job, weights, "pretrain")
    assert count == sum(lengths) - V * len(lengths)  # the first token of a text follows a virtual one
    assert np.isfinite(total)


# --- values ---------------------------------------------------------------------------------------------------------


def test_a_table_with_virtual_rows():
    w = SoftPrompt(jnp.arange(8.0).reshape(4, 2), -jnp.arange(1.0, 7.0).reshape(3, 2))
    assert take(w, jnp.array([[3, 4, 6]]), jnp.float32).tolist() == [[[6, 7], [-1, -2], [-5, -6]]]
    assert w.shape == densify(w).shape == (4, 2)
    assert list(w.virtual_ids) == [4, 5, 6]


def test_prompts_start_as_embeddings_of_a_text_or_of_tokens(tiny, made):
    job, weights, _ = made({**PROMPT, "tokens": 9, "text": "the fox"})
    table, ids = weights["embed_tokens"]["weight"], job.tokenizer("the fox").input_ids
    assert 1 < len(ids) < 9
    want = np.asarray(table.base)[np.resize(ids, 9)]
    np.testing.assert_array_equal(table.prompt, want)
    _, weights, _ = made(PROMPT)
    table = weights["embed_tokens"]["weight"]
    assert all((np.asarray(table.base) == row).all(1).any() for row in np.asarray(table.prompt))


def test_the_encoder_is_three_layers_with_relu_between(made):
    _, weights, _ = made(MLP)
    e = weights["embed_tokens"]["weight"].prompt
    (w1, b1), (w2, b2), (w3, b3) = ((np.asarray(d.weight), np.asarray(d.bias)) for d in e.dense)
    assert (w1.shape, w2.shape, w3.shape) == ((32, 6), (6, 6), (6, 32))
    hidden = np.maximum(np.maximum(np.asarray(e.table) @ w1 + b1, 0) @ w2 + b2, 0)
    np.testing.assert_allclose(densify(e), hidden @ w3 + b3, atol=1e-6)
    assert np.abs(w1).max() <= 32**-0.5


@pytest.mark.parametrize("t", [PROMPT, MLP, PREFIX], ids=["prompt", "mlp", "prefix"])
def test_only_the_prompt_trains(made, t):
    job, _, weights = made(t)
    names = {k for k, found in m_labels(job).items() if found != m.FROZEN}
    assert names
    assert all(n.startswith("embed_tokens/weight/") and not n.endswith("/base") for n in names)
    trainable, _ = m.split(weights, job.blueprint.labels)
    if t is not MLP:
        assert m.count(trainable) == (V * 32 if t is PROMPT else 2 * 2 * V * 2 * 8)


def m_labels(job):
    from jaxtune.weights import path_name

    return {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(job.blueprint.labels)}


# --- generation -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[PROMPT, PREFIX], ids=["prompt", "prefix"])
def export(request, tiny, sums_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "r"
    c = make_config(
        tiny, sums_file, out, tuning=request.param, data__max_length=64, optim__learning_rate=0.3, data__validation=8,
        checkpoint__every=3, objective="pretrain",
    )  # fmt: skip
    return run.train(c)


@pytest.fixture(scope="module")
def opened(export):
    return open_model(str(export))


TEXTS = ["the fox", "1 + 2 =", "the fox eats berries and the fox eats"]


def test_a_text_does_not_depend_on_others_and_is_the_forward_pass(opened):
    g, s = opened.generator, Sampling(8)
    together = [x.ids for x in g.generate(TEXTS, s)]
    assert together == [g.generate([t], s)[0].ids for t in TEXTS]
    judged = g.judge([g.encode(t) for t in TEXTS], together)
    assert all(x.greedy for x in judged)


def test_sampling_beams_penalties_and_stops_go_with_a_prompt(opened):
    g = opened.generator
    plain = g.generate(TEXTS[:1], Sampling(8))[0]
    assert opened.tokenizer.decode(plain.ids, skip_special_tokens=True).strip() in plain.text
    g.generate(TEXTS, Sampling(4, beams=2))
    two = g.generate(TEXTS[:1], Sampling(4, temperature=1.0, samples=2, repetition_penalty=1.3, top_k=9))
    assert len(two) == 2
    assert max(i for x in two for i in x.ids) < 300


def test_virtual_tokens_count_in_the_context(opened):
    assert opened.generator.context == 128 - V
    with pytest.raises(UserError, match="context is 125 beside 3 virtual tokens"):
        opened.generator.generate([[5] * 125])


def test_evaluation_of_an_export_is_that_of_training(export, opened, sums_file, capsys):
    from jaxtune import log

    held = [x for x in log.read_metrics(export / "metrics.jsonl") if "eval_loss" in x]
    assert held[-1]["eval_loss"] < held[0]["eval_loss"]
    c = config.load(export / "config.yaml")
    scores = opened.scores(jobs.prepare(c).data.validation, 4, "pretrain")
    assert scores["loss"] == pytest.approx(held[-1]["eval_loss"], rel=1e-4)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["evaluate", str(export / "export"), str(sums_file), "max_length=64", "--objective", "pretrain"])
    assert "perplexity" in capsys.readouterr().out


def test_a_run_goes_on_from_its_checkpoint(export, tmp_path):
    """Without the last checkpoint and the export, and opened in between."""
    import shutil

    weights = (export / "export/adapter_model.safetensors").read_bytes()
    half = tmp_path / "r"
    shutil.copytree(export, half)
    shutil.rmtree(half / "export")
    shutil.rmtree(half / "checkpoints/6")
    c = config.load(half / "config.yaml").model_copy(update={"output": str(half)})
    (half / "config.yaml").write_text(config.dump(c))
    assert soft_prompt.of(open_model(str(half)).weights) is not None
    run.train(c)
    assert (half / "export/adapter_model.safetensors").read_bytes() == weights


def test_a_prompt_is_not_merged(export, tiny, tmp_path):
    for source in (str(export), str(export / "export")):
        with pytest.raises(UserError, match=r"a prompt is no part of the weights.*use it as an adapter"):
            convert.write_model(source, tmp_path / "out")
    with pytest.raises(UserError, match=r"a prompt is no part of the weights"):
        convert.write_model(str(tiny), tmp_path / "out", str(export / "export"))
    assert not (tmp_path / "out").exists()


# --- combinations ---------------------------------------------------------------------------------------------------


def test_a_quantised_base_and_half_precision(tiny, sums_file, tmp_path):
    c = make_config(
        tiny, sums_file, tmp_path / "r", tuning={**PROMPT, "base": "nf4", "group": 16}, data__max_length=64,
        train__compute_dtype="bfloat16", train__remat="full", train__steps=2,
    )  # fmt: skip
    model = open_model(str(run.train(c)))
    assert isinstance(soft_prompt.of(model.weights), SoftPrompt)


def test_layers_in_groups_see_their_own_prefix(tmp_path):
    folder = write_tiny(tmp_path / "m", layers=3, windows=(4, 0, 4))
    b, weights = _drawn(folder, [("^layers/2/", m.TRAIN), ("/[kv]_LKVH$", m.TRAIN), ("", m.FROZEN)])
    assert b.decoder.groups == (2, 1)
    whole, same = _drawn(folder, None)
    assert whole.decoder.groups == (3,)
    ids = jnp.arange(24).reshape(2, 12)
    args = ids, jnp.ones_like(ids), jnp.broadcast_to(jnp.arange(12), ids.shape)
    got, want = (
        jax.jit(lambda w, b=b: b.model.apply({"params": w}, *args)[0].logits())(w)
        for b, w in ((b, weights), (whole, same))
    )
    np.testing.assert_allclose(got, want, atol=1e-5)


def _drawn(folder, rules):
    from jaxtune import sharding

    def method(d):
        made = tuning.make(config.Prefix(**PREFIX), d)
        return made if rules is None else made._replace(rules=rules)

    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    b = blueprint.draw(folder, method, mesh, "float32")
    weights = unbox(blueprint.materialise(b, jax.random.key(0)))
    table = weights["embed_tokens"]["weight"]
    k, v = (jax.random.normal(jax.random.key(i), table.k_LKVH.shape) for i in range(2))
    return b, {**weights, "embed_tokens": {"weight": Prefix(table.base, k, v)}}


def test_what_does_not_go_is_refused(tiny, sums_file, tmp_path):
    def prepare(t, **changes):
        jobs.prepare(make_config(tiny, sums_file, tmp_path / "r", tuning=t, **changes))

    with pytest.raises(UserError, match=r"tuning.text is for tuning.encoder=none"):
        prepare({**MLP, "text": "the fox"})
    with pytest.raises(UserError, match=r"max_length=32 has no room beside 31 virtual tokens; .* lower tuning.tokens"):
        prepare({**PROMPT, "tokens": 31})
    for t in (PROMPT, PREFIX):
        with pytest.raises(UserError, match=rf"method={t['method']} exports a prompt alone.* take method: lora"):
            prepare(t, vocabulary__add=[f"<{i}>" for i in range(99)])


def test_a_damaged_prompt_folder_is_refused(tiny, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    with pytest.raises(UserError, match=r"adapter_model.safetensors"):
        open_model(str(tiny), str(tmp_path))
    from safetensors.numpy import save_file

    save_file(
        {"prompt_embeddings": np.ones((2, 32), np.float32), "x": np.ones(2)}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match=r"'prompt_embeddings' alone was expected of PROMPT_TUNING, there is .*x"):
        open_model(str(tiny), str(tmp_path))
