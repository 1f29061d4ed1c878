"""AdaLoRA beside peft: the same losses, the same ranks, and an export that peft opens."""

import json
import re

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from jaxtune import blueprint, convert, run, steps
from jaxtune import job as jobs
from jaxtune.data.pipeline import Batches
from jaxtune.layers import plain_names, unbox
from jaxtune.objectives import OBJECTIVES
from jaxtune.training import State, make_step
from jaxtune.tuned import open_model
from jaxtune.tuning import method as m
from jaxtune.weights import is_node, path_name
from tests.tiny import make_config

STEPS = 24
TUNING = {
    "method": "adalora", "init_rank": 4, "rank": 2, "alpha": 8.0, "warmup": 3, "final": 4, "every": 2,
    "orthogonal": 0.5, "beta1": 0.8, "beta2": 0.9,
}  # fmt: skip


@pytest.fixture(scope="module")
def stories(assets):
    return assets / "models" / "stories260K"


def theirs(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def settings(stories, assets, out, **more):
    return make_config(
        stories, assets / "data/alpaca_en_demo/train.jsonl", out, tuning=TUNING, data__max_length=128,
        optim__schedule="constant", optim__warmup=0, optim__clip=0.5, train__steps=STEPS, optim__learning_rate=2e-2,
        data__packing=False, **more,
    )  # fmt: skip


def by_layer(tree):
    """Our adapters' factors in peft's layout, by the module's plain name."""
    out = {}
    for path, w in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_node):
        if not is_node(w):
            continue
        for i, plain in enumerate(plain_names(path_name(path))):
            a, e, b = (np.asarray(x[i]) for x in (w.a, w.e, w.b))
            r = e.size
            out[plain.removesuffix("/weight")] = a.reshape(-1, r).T, e[:, None], b.reshape(r, -1).T
    return out


def test_losses_and_ranks_are_pefts(stories, assets, tmp_path):
    job = jobs.prepare(settings(stories, assets, tmp_path / "r"))
    b = job.blueprint
    tree = unbox(blueprint.materialise(b, jax.random.key(0)))
    c = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=8, tinit=3, tfinal=4, deltaT=2, beta1=0.8, beta2=0.9, orth_reg_weight=0.5,
        total_step=STEPS, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    model = peft.get_peft_model(theirs(stories), c)
    named = dict(model.named_parameters())

    def their(plain, letter):
        return named[f"base_model.model.model.{plain.replace('/', '.')}.lora_{letter}.default"]

    with torch.no_grad():
        for plain, factors in by_layer(tree).items():
            for letter, x in zip("AEB", factors, strict=True):
                their(plain, letter).copy_(torch.tensor(x))
    trains = [p for p in model.parameters() if p.requires_grad]
    trainable, frozen = m.split(tree, b.labels)
    assert sum(p.numel() for p in trains) == m.count(trainable)
    adam = torch.optim.AdamW(trains, lr=2e-2, weight_decay=0.0)
    state = State(trainable, frozen, job.tx.init(trainable), jax.numpy.int32(0), jax.random.key_data(jax.random.key(0)))
    step = jax.jit(make_step(steps.apply_of(b), OBJECTIVES["sft"], job.tx, penalty=b.method.penalty))
    ours, torchs, ranks = [], [], []
    for n, batch in enumerate(Batches(job.data.train, 4, seed=0, row_count=4 * STEPS), start=1):
        askew = float(b.method.penalty(state.trainable))
        state, report = step(state, {k: v[None] for k, v in batch.columns.items()})
        ours.append(float(report["loss"]) + askew)
        ids, mask, seg = (torch.tensor(batch.columns[k]).long() for k in ("ids_BT", "loss_mask_BT", "segment_BT"))
        labels = torch.where((mask > 0) & (seg > 0), ids, -100)
        labels[:, 0] = -100
        loss = model(input_ids=ids, attention_mask=seg, labels=labels).loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trains, 0.5)
        adam.step()
        model.base_model.update_and_allocate(n)
        torchs.append(float(loss.detach()))
        if pattern := model.peft_config["default"].rank_pattern:
            kept = {path: np.asarray(x) for path, x in state.optimiser.keep.items()}
            mine = {
                plain.removesuffix("/weight"): x[i].tolist()
                for path, x in kept.items()
                for i, plain in enumerate(plain_names(path))
            }
            want = {
                re.search(r"layers\.\d+\.\w+\.\w+", name)[0].replace(".", "/"): list(map(bool, x))
                for name, x in pattern.items()
            }
            assert mine == want, n
            zero = {plain: (factors[1] == 0).sum() for plain, factors in by_layer(state.trainable).items()}
            assert zero == {plain: int((their(plain, "E") == 0).sum()) for plain in zero}
        ranks.append(sum(int(x) for x in b.method.choice(state.optimiser).values()))
    assert len(ours) == STEPS
    np.testing.assert_allclose(ours, torchs, rtol=1e-4)
    adapters = 7 * b.decoder.layers
    assert ranks[2] == 4 * adapters
    assert ranks[-1] == ranks[-5] == 2 * adapters
    assert sorted(ranks, reverse=True) == ranks
    assert len(set(ranks)) > 5


IDS = np.random.default_rng(0).integers(3, 300, (2, 40))


def our_logits(model):
    at = np.broadcast_to(np.arange(IDS.shape[1]), IDS.shape)

    @jax.jit
    def logits(weights):
        return model.blueprint.model.apply({"params": weights}, IDS, np.ones_like(IDS), at)[0].logits()

    return np.asarray(logits(model.weights))


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def test_what_is_left_is_exported_as_plain_lora(tiny, sums_file, tmp_path):
    """peft, we and the merged model give the same logits; the export's ranks are those of the record."""
    c = make_config(
        tiny, sums_file, tmp_path / "r", tuning=TUNING, train__steps=STEPS, optim__learning_rate=0.1, optim__clip=0
    )
    out = run.train(c)
    held = json.loads((out / "export/adapter_config.json").read_text())
    assert held["peft_type"] == "LORA"
    last = json.loads((out / "allocation.jsonl").read_text().splitlines()[-1])["allocation"]
    left = {unit: rank for unit, rank in last.items() if rank}
    assert sum(left.values()) == 2 * len(last)
    assert len(set(left.values())) > 1
    opened = peft.PeftModel.from_pretrained(theirs(tiny), out / "export")
    for name, p in opened.named_parameters():
        if "lora_A" in name:
            unit = re.search(r"layers\.\d+\.\w+\.\w+", name)[0].replace(".", "/")
            assert p.shape[0] == left.pop(unit)
    assert not left
    got = torch_logits(opened)
    assert np.abs(got - torch_logits(theirs(tiny))).max() > 0.1
    np.testing.assert_allclose(our_logits(open_model(str(out))), got, atol=1e-4, rtol=1e-4)
    convert.write_model(str(out), tmp_path / "merged")
    np.testing.assert_allclose(torch_logits(theirs(tmp_path / "merged")), got, atol=1e-4, rtol=1e-4)
