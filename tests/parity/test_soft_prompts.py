"""Soft prompts beside torch and peft: steps, folders both ways, generation."""

import functools
import json

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from jaxtune import blueprint, run, steps
from jaxtune import job as jobs
from jaxtune.data.pipeline import Batches
from jaxtune.errors import UserError
from jaxtune.generate import Generator, Sampling
from jaxtune.hf import soft_prompts
from jaxtune.layers import unbox
from jaxtune.nodes import soft_prompt
from jaxtune.objectives import OBJECTIVES
from jaxtune.training import State, make_step
from jaxtune.tuned import open_model
from jaxtune.tuning import method as m
from jaxtune.tuning.prompt import encoder
from jaxtune.weights import densify
from tests.parity import families
from tests.tiny import make_config, write_tiny

V = 5
TUNING = {
    "prompt": {"method": "prompt", "tokens": V},
    "encoder": {"method": "prompt", "tokens": V, "encoder": "mlp", "encoder_hidden": 16},
    "prefix": {"method": "prefix", "tokens": V},
}
TYPES = {
    "prompt": (peft.PromptTuningConfig, {}),
    "encoder": (peft.PromptEncoderConfig, {"encoder_hidden_size": 16}),
    "prefix": (peft.PrefixTuningConfig, {}),
}
IDS = np.random.default_rng(0).integers(3, 300, (2, 24))


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def their_prompt(folder, name):
    """A fresh soft prompt of peft's."""
    kind, more = TYPES[name]
    return peft.get_peft_model(theirs(folder), kind(task_type="CAUSAL_LM", num_virtual_tokens=V, **more))


def torch_logits(model, ids=IDS, mask=None):
    """Of the text alone."""
    with torch.no_grad():
        mask = torch.ones(ids.shape, dtype=torch.long) if mask is None else torch.tensor(mask)
        return model(input_ids=torch.tensor(ids), attention_mask=mask).logits[:, -ids.shape[1] :].numpy()


def our_logits(model, ids=IDS):
    """Of the text alone."""
    first = np.broadcast_to(
        np.array(model.blueprint.virtual_ids, np.int32), (len(ids), len(model.blueprint.virtual_ids))
    )
    ids_BT = np.concatenate([first, ids], 1)
    at = np.broadcast_to(np.arange(ids_BT.shape[1]), ids_BT.shape)
    logits = compiled(model.blueprint.model)(model.weights, ids_BT, np.ones_like(ids_BT), at)
    return np.asarray(logits)[:, first.shape[1] :]


@functools.cache
def compiled(model):
    return jax.jit(lambda weights, *columns: model.apply({"params": weights}, *columns)[0].logits())


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_twenty_steps_agree_with_peft(assets, tmp_path, name):
    """Same weights, same initial prompt, same batches, AdamW: 20 losses within 1e-4 relative."""
    stories = assets / "models" / "stories260K"
    c = make_config(
        stories, tmp_path, tmp_path / "r", tuning=TUNING[name], data__max_length=160, data__packing=False,
        data__train=[{"path": str(assets / "data/alpaca_en_demo/train.jsonl"), "max_samples": 80}],
        optim__schedule="constant", optim__warmup=0, optim__weight_decay=0.0, optim__clip=1.0, train__steps=20,
    )  # fmt: skip
    job = jobs.prepare(c)
    tree = unbox(blueprint.materialise(job.blueprint, jax.random.key(0)))
    model = their_prompt(stories, name)
    soft_prompts.write(tmp_path, soft_prompt.of(tree), "", job.blueprint.decoder)
    with torch.no_grad():
        start = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
        model.prompt_encoder["default"].embedding.weight.copy_(start)
    trains = [p for p in model.parameters() if p.requires_grad]
    trainable, frozen = m.split(tree, job.blueprint.labels)
    assert sum(p.numel() for p in trains) == m.count(trainable)
    adam = torch.optim.AdamW(trains, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    tx = job.tx
    state = State(trainable, frozen, tx.init(trainable), jax.numpy.int32(0), jax.random.key_data(jax.random.key(0)))
    step = jax.jit(make_step(steps.apply_of(job.blueprint), OBJECTIVES["sft"], tx))
    first = len(job.blueprint.virtual_ids)
    ours, torchs = [], []
    for batch in Batches(job.data.train, 4, seed=0, row_count=80):
        state, report = step(state, {k: v[None] for k, v in batch.columns.items()})
        ours.append(float(report["loss"]))
        columns = (batch.columns[k][:, first:] for k in ("ids_BT", "loss_mask_BT", "segment_BT"))
        ids, mask, seg = (torch.tensor(x).long() for x in columns)
        loss = model(input_ids=ids, attention_mask=seg, labels=torch.where((mask > 0) & (seg > 0), ids, -100)).loss
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trains, 1.0)
        adam.step()
        torchs.append(float(loss.detach()))
        np.testing.assert_allclose(float(report["grad_norm"]), float(norm), rtol=2e-3)
    assert len(ours) == 20
    assert torchs[-1] < torchs[0]
    np.testing.assert_allclose(ours, torchs, rtol=1e-4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("base") / "m", template=True, tied=False)


@pytest.fixture(scope="module", params=TUNING)
def trained(request, base, sums_file, tmp_path_factory):
    """A run of each kind."""
    out = tmp_path_factory.mktemp(request.param) / "r"
    return request.param, run.train(
        make_config(base, sums_file, out, tuning=TUNING[request.param], data__max_length=64, optim__learning_rate=0.1)
    )


@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning")
def test_an_export_gives_peft_the_same_logits_and_texts(trained, base):
    name, out = trained
    opened = peft.PeftModel.from_pretrained(theirs(base), out / "export").eval()
    kind = json.loads((out / "export/adapter_config.json").read_text())["peft_type"]
    assert kind == ("PREFIX_TUNING" if name == "prefix" else "PROMPT_TUNING")
    ours = open_model(str(out))
    got = torch_logits(opened)
    assert np.abs(got - torch_logits(theirs(base))).max() > 0.05
    np.testing.assert_allclose(our_logits(ours), got, atol=1e-4, rtol=1e-4)
    if name == "encoder":
        return
    prompts = [IDS[0, :7].tolist(), IDS[1, :12].tolist()]
    made = Generator(ours.blueprint.model, ours.weights, ours.tokenizer, ()).generate(prompts, Sampling(16))
    for prompt, g in zip(prompts, made, strict=True):
        want = opened.generate(input_ids=torch.tensor([prompt]), max_new_tokens=16, min_new_tokens=16, do_sample=False)
        assert g.ids == want[0].tolist()[-16:]


@pytest.mark.parametrize("name", TUNING)
def test_a_folder_made_by_peft_is_read(base, tmp_path, name):
    torch.manual_seed(0)
    model = their_prompt(base, name)
    model.save_pretrained(tmp_path / "a")
    want = torch_logits(model.eval())
    for opened in (open_model(str(base), str(tmp_path / "a")), open_model(str(tmp_path / "a"))):
        np.testing.assert_allclose(our_logits(opened), want, atol=1e-4, rtol=1e-3)


def test_a_projected_prefix_is_read(base, tmp_path):
    torch.manual_seed(0)
    kind = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=V, prefix_projection=True, encoder_hidden_size=16
    )
    model = peft.get_peft_model(theirs(base), kind)
    model.save_pretrained(tmp_path / "a")
    np.testing.assert_allclose(
        our_logits(open_model(str(tmp_path / "a"))), torch_logits(model.eval()), atol=1e-4, rtol=1e-3
    )


def test_a_prompt_of_another_model_is_refused(base, tmp_path):
    for name in ("prompt", "prefix"):
        their_prompt(write_tiny(tmp_path / f"m{name}", embed=16, layers=3), name).save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=r"the model takes \d+ numbers for each virtual token; take the model that"):
            open_model(str(base), str(tmp_path / name))


@pytest.mark.parametrize(("family", "name"), [("gemma3", "prompt"), ("mistral", "prefix"), ("phi4_mini", "prefix")])
@pytest.mark.filterwarnings("ignore")
def test_scaled_tables_windows_and_fused_matrices(tmp_path, family, name):
    """A folder of peft's gives its logits, and written anew it is the same."""
    base = families.write(tmp_path / "m", family)
    torch.manual_seed(0)
    kind, more = TYPES[name]
    model = peft.get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=V, **more)).eval()
    model.save_pretrained(tmp_path / "a")
    opened = open_model(str(tmp_path / "m"), str(tmp_path / "a"))
    np.testing.assert_allclose(our_logits(opened), torch_logits(model), atol=1e-4, rtol=1e-3)
    (tmp_path / "b").mkdir()
    soft_prompts.write(tmp_path / "b", soft_prompt.of(opened.weights), "", opened.blueprint.decoder)
    before, after = (load_file(tmp_path / f / "adapter_model.safetensors") for f in "ab")
    torch.testing.assert_close(after["prompt_embeddings"], before["prompt_embeddings"])


def test_the_encoder_is_pefts():
    """Its output and the gradients of its values."""
    ours = unbox(encoder(jax.random.key(0), V, 8, 6))
    kind = peft.PromptEncoderConfig(
        num_virtual_tokens=V, token_dim=8, encoder_hidden_size=6, num_transformer_submodules=1
    )
    theirs = peft.PromptEncoder(kind)
    leaves = [ours.table, *(x for d in ours.dense for x in (d.weight.T, d.bias))]
    with torch.no_grad():
        for p, x in zip(theirs.parameters(), leaves, strict=True):
            p.copy_(torch.tensor(np.asarray(x)))
    out = theirs(torch.arange(V))
    (out**2).sum().backward()
    np.testing.assert_allclose(densify(ours), out.detach().numpy(), atol=1e-6)
    grads = jax.grad(lambda e: (densify(e) ** 2).sum())(ours)
    np.testing.assert_allclose(grads.table, theirs.embedding.weight.grad.numpy(), atol=1e-6)
    np.testing.assert_allclose(grads.dense[0].weight.T, theirs.mlp_head[0].weight.grad.numpy(), atol=1e-6)
