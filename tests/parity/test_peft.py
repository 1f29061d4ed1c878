"""Steps, adapters and exports beside torch, transformers and peft."""

import json
import re

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from jaxtune import blueprint, convert, run, steps, tuned
from jaxtune import job as jobs
from jaxtune.data.pipeline import Batches
from jaxtune.errors import UserError
from jaxtune.hf import adapters, files
from jaxtune.objectives import OBJECTIVES
from jaxtune.training import State, make_step
from jaxtune.tuned import open_model
from jaxtune.tuning import method as m
from tests.parity.families import write
from tests.tiny import make_config, write_tiny

ROOT = {"lora": {"method": "lora", "rank": 4, "alpha": 8.0}, "full": {"method": "full"}}
ROOT["freeze"] = {"method": "freeze", "last": 2, "train": ["norm/weight$"]}
ROOT["rslora on some"] = {"method": "lora", "rank": 4, "alpha": 8.0, "rslora": True, "targets": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def stories(assets):
    return assets / "models" / "stories260K"


def theirs(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tensors(job, boxes):
    """Our weights under their names, layer by layer: what trains, in torch's layout."""
    return {n: torch.tensor(np.asarray(e.data())) for n, e in blueprint.full_tensors(job.blueprint, boxes).items()}


@pytest.mark.parametrize("name", ROOT)
def test_twenty_steps_agree_with_torch(stories, assets, tmp_path, name):
    steps_agree_with_torch(stories, assets, tmp_path, ROOT[name])


def steps_agree_with_torch(stories, assets, tmp_path, t):
    """Same weights, same initial adapters, same batches, AdamW: 20 losses within 1e-4 relative."""
    adapts = t["method"] not in ("full", "freeze")
    rate = 3e-3 if adapts else 3e-4
    c = make_config(
        stories, assets / "data/alpaca_en_demo/train.jsonl", tmp_path / "r", tuning=t, data__max_length=128,
        optim__schedule="constant", optim__warmup=0, optim__weight_decay=0.0, optim__clip=1.0, train__steps=20,
        optim__learning_rate=rate, data__packing=False,
    )  # fmt: skip
    job = jobs.prepare(c)
    boxes = blueprint.materialise(job.blueprint, jax.random.key(0))
    if adapts:  # B away from zero, so that both factors matter from the start
        boxes = jax.tree_util.tree_map_with_path(
            lambda p, x: x + 0.02 if str(p[-2]) in (".b", ".lambda_b") else x, boxes, is_leaf=lambda x: False
        )
    tree = jax.tree.map(lambda w: w.value, boxes, is_leaf=lambda x: hasattr(x, "names"))
    model = theirs(stories)
    if adapts:
        nodes, names = blueprint.adapted(job.blueprint, boxes), m.decoder_names(job.blueprint.decoder)
        adapters.write(tmp_path, nodes, names, str(stories), "llama", {}, rslora=t.get("rslora", False))
        model = peft.PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    elif t["method"] == "freeze":
        for n, p in model.named_parameters():
            p.requires_grad = "layers.3" in n or "layers.4" in n or n == "model.norm.weight" or "layernorm" in n
    trains = [p for p in model.parameters() if p.requires_grad]
    trainable, frozen = m.split(tree, job.blueprint.labels)
    assert sum(p.numel() for p in trains) == m.count(trainable)
    adam = torch.optim.AdamW(trains, lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    tx = job.tx
    state = State(trainable, frozen, tx.init(trainable), jax.numpy.int32(0), jax.random.key_data(jax.random.key(0)))
    step = jax.jit(make_step(steps.apply_of(job.blueprint), OBJECTIVES["sft"], tx))
    batches = Batches(job.data.train, 4, seed=0, row_count=80)
    ours, torchs = [], []
    for batch in batches:
        state, report = step(state, {k: v[None] for k, v in batch.columns.items()})
        ours.append(float(report["loss"]))
        ids, mask, seg = (torch.tensor(batch.columns[k]).long() for k in ("ids_BT", "loss_mask_BT", "segment_BT"))
        labels = torch.where((mask > 0) & (seg > 0), ids, -100)
        labels[:, 0] = -100
        loss = model(input_ids=ids, attention_mask=seg, labels=labels).loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trains, 1.0)
        adam.step()
        torchs.append(float(loss.detach()))
    assert len(ours) == 20
    assert torchs[-1] < torchs[0]
    np.testing.assert_allclose(ours, torchs, rtol=1e-4)


@pytest.fixture(scope="module")
def lora_run(stories, assets, tmp_path_factory):
    """A real LoRA run: stories260K on instructions; then its folder."""
    out = tmp_path_factory.mktemp("run") / "r"
    c = make_config(
        stories, assets / "data/alpaca_en_demo/train.jsonl", out, data__max_length=256, data__validation=64,
        train__steps=25, train__batch_size=8, optim__learning_rate=3e-3, train__log_every=5, tuning__dropout=0.05,
    )  # fmt: skip
    return run.train(c)


IDS = np.random.default_rng(0).integers(3, 512, (2, 40))


def our_logits(model, ids=IDS):
    at = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return np.asarray(model.blueprint.model.apply({"params": model.weights}, ids, np.ones_like(ids), at)[0].logits())


def torch_logits(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def test_lora_lowers_the_validation_loss(lora_run):
    held = [x["eval_loss"] for x in tuned.Run(lora_run).metrics if "eval_loss" in x]
    assert held[-1] < 0.9 * held[0]


def test_the_adapter_gives_peft_the_same_logits(lora_run, stories):
    opened = peft.PeftModel.from_pretrained(theirs(stories), lora_run / "export")
    got = torch_logits(opened)
    assert np.abs(got - torch_logits(theirs(stories))).max() > 0.1
    np.testing.assert_allclose(our_logits(open_model(str(lora_run))), got, atol=1e-4, rtol=1e-4)


def test_the_merged_folder_gives_transformers_the_same_logits(lora_run, tmp_path):
    convert.write_model(str(lora_run), tmp_path / "merged")
    np.testing.assert_allclose(
        torch_logits(theirs(tmp_path / "merged")), our_logits(open_model(str(lora_run))), atol=1e-4, rtol=1e-4
    )


def test_the_export_is_a_whole_adapter_folder(lora_run, stories):
    files = {f.name for f in (lora_run / "export").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= files
    c = json.loads((lora_run / "export/adapter_config.json").read_text())
    assert c["target_modules"] == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    assert c["base_model_name_or_path"] == str(stories)
    tok = transformers.AutoTokenizer.from_pretrained(lora_run / "export")
    assert "### Response:" in tok.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )


def test_an_adapter_made_by_peft_is_read(tmp_path):
    """Patterns of rank and alpha by layer, rsLoRA, a head: then the same logits, merged and not."""
    folder = write_tiny(tmp_path / "m", tied=False, layers=3)
    torch.manual_seed(0)
    c = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "o_proj", "down_proj", "lm_head"],
        rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"layers.2.mlp.down_proj": 9},
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(theirs(folder), c)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    ids = IDS % 300
    want = torch_logits(model, ids)
    for opened in (open_model(str(folder), str(tmp_path / "a")), open_model(str(tmp_path / "a"))):
        np.testing.assert_allclose(our_logits(opened, ids), want, atol=1e-4, rtol=1e-3)
    convert.write_model(str(tmp_path / "a"), tmp_path / "merged")
    np.testing.assert_allclose(torch_logits(theirs(tmp_path / "merged"), ids), want, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("t", ["full", "freeze"])
def test_whole_exports_open_in_transformers(tmp_path, sums_file, t):
    folder = write_tiny(tmp_path / "m", layers=3, tied=t == "full")
    method = {"method": "freeze", "last": 1, "train": ["head"]} if t == "freeze" else ROOT["full"]
    out = run.train(make_config(folder, sums_file, tmp_path / "r", tuning=method))
    ids = IDS % 300
    got = torch_logits(theirs(out / "export"), ids)
    np.testing.assert_allclose(our_logits(open_model(str(out)), ids), got, atol=1e-4, rtol=1e-4)
    assert np.abs(got - torch_logits(theirs(folder), ids)).max() > 1e-3


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_an_adapter_that_changed_its_base_is_refused(tmp_path, init):
    folder = write_tiny(tmp_path / "m")
    (tmp_path / "a").mkdir()
    c = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "init_lora_weights": init}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(c))
    with pytest.raises(UserError, match=rf"init_lora_weights='{init}' changes the base model too"):
        open_model(str(folder), str(tmp_path / "a"))


def test_patterns_of_ranks_are_pefts():
    both = {"q_proj|k_proj": 3}
    assert adapters._by_pattern(both, "model.layers.0.self_attn.k_proj", 1) == 3
    assert adapters._by_pattern(both, "model.layers.0.self_attn.q_proj_x", 1) == 1


def test_modules_with_biases_train_whole_without_them(tmp_path, sums_file):
    """The biases stay as they are, and go along for peft, which wants the whole module."""
    base = write(tmp_path / "m", "qwen2")
    t = {"method": "lora", "rank": 2, "targets": ["up_proj"], "train": ["q_proj|k_proj"]}
    out = run.train(make_config(tmp_path / "m", sums_file, tmp_path / "r", tuning=t))
    c = json.loads((out / "export/adapter_config.json").read_text())
    assert len(c["modules_to_save"]) == 6
    brought = files.read_header(out / "export/adapter_model.safetensors")
    before = base.state_dict()
    for n in [x.removesuffix(".weight") for x in before if re.search(r"[qk]_proj.weight", x)]:
        weight, bias = (brought[f"base_model.model.{n}.{part}"].open() for part in ("weight", "bias"))
        assert np.abs(weight - before[f"{n}.weight"].numpy()).max() > 1e-4
        np.testing.assert_array_equal(bias, before[f"{n}.bias"])
    ids = IDS % 300
    opened = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32), out / "export"
    )
    np.testing.assert_allclose(our_logits(open_model(str(out)), ids), torch_logits(opened, ids), atol=1e-4, rtol=1e-4)


def test_biases_that_peft_trained_are_read(tmp_path):
    model = write(tmp_path / "m", "qwen2")
    c = peft.LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["v_proj"], task_type="CAUSAL_LM")
    tuned_ = peft.get_peft_model(model, c)
    with torch.no_grad():
        for n, p in tuned_.named_parameters():
            if "modules_to_save" in n:
                p.add_(torch.randn_like(p) * 0.1)
    tuned_.save_pretrained(tmp_path / "a")
    ids = IDS % 300
    opened = open_model(str(tmp_path / "m"), str(tmp_path / "a"))
    np.testing.assert_allclose(our_logits(opened, ids), torch_logits(tuned_, ids), atol=1e-4, rtol=1e-4)
