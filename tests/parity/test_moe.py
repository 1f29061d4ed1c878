"""Mixtures of experts: the load-balancing loss, adapters on experts, and an expert axis."""

import json

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from jaxtune import blueprint, convert, log, run, steps
from jaxtune import job as jobs
from jaxtune.errors import UserError
from jaxtune.hf import files, load
from jaxtune.objectives import OBJECTIVES
from jaxtune.tuned import open_model
from tests.parity.families import V, write
from tests.parity.test_families import in_file_names, off
from tests.parity.test_families import run as forward
from tests.tiny import make_config, on_eight_devices

MODELS = ["mixtral", "qwen3_moe"]


@pytest.mark.parametrize("name", MODELS)
def test_the_balancing_loss_and_its_gradients(tmp_path, name):
    """With padding, which counts for neither loss."""
    model = write(tmp_path / "m", name, output_router_logits=True, router_aux_loss_coef=0.1)
    opened = open_model(str(tmp_path / "m"))
    b = opened.blueprint
    assert b.decoder.router_loss == 0.1
    rng = np.random.default_rng(0)
    ids, seg = rng.integers(3, V, (2, 24)), np.ones((2, 24), np.int32)
    seg[1, 20:] = 0
    labels = torch.where(torch.tensor(seg) > 0, torch.tensor(ids), -100)
    out = model(torch.tensor(ids), attention_mask=torch.tensor(seg), labels=labels)
    out.loss.backward()
    batch = {
        "ids_BT": ids, "segment_BT": seg, "loss_mask_BT": seg, "position_BT": np.broadcast_to(np.arange(24), ids.shape),
    }  # fmt: skip
    assert float(forward(opened, ids, seg).balance) == pytest.approx(float(out.aux_loss.detach()), rel=1e-5)

    def loss(weights):
        outputs = steps.apply_of(b)(weights, batch)
        total, count, _ = OBJECTIVES["sft"](outputs, batch)
        return total / count + b.decoder.router_loss * outputs.balance

    value, grads = jax.value_and_grad(loss)(opened.weights)
    assert float(value) == pytest.approx(float(out.loss.detach()), rel=1e-5)
    got = {n: e.data() for n, e in files.entries(blueprint.boxed(b, grads), np.dtype("f4"), b.decoder.family).items()}
    want = in_file_names({n: p.grad.numpy() for n, p in model.named_parameters()}, b.decoder.family)
    for n, g in want.items():
        assert off(got[n], g) < 1e-4, n


def test_the_step_takes_the_weight_that_it_is_given(tmp_path, sums_file):
    """Gradients move with `train.router_loss`; the loss that is told is the data's."""
    write(tmp_path / "m", "qwen3_moe")
    assert open_model(str(tmp_path / "m")).blueprint.decoder.router_loss == 0.0
    told = []
    for weight in (None, 5.0):
        c = make_config(tmp_path / "m", sums_file, tmp_path / str(weight), train__router_loss=weight, train__steps=2)
        run.train(c)
        told.append([m for m in log.read_metrics(tmp_path / str(weight) / "metrics.jsonl") if "loss" in m])
    assert told[0][0]["loss"] == told[1][0]["loss"]
    assert told[0][1]["loss"] != told[1][1]["loss"]
    assert told[0][0]["router_balance"] >= 1.9  # two experts for each token: 2 where all is even


@pytest.mark.parametrize(
    ("name", "targets"), [("mixtral", "all-linear"), ("qwen3_moe", ["experts/down_proj", "q_proj"])]
)
def test_adapters_on_experts_open_in_peft(tmp_path, sums_file, name, targets):
    write(tmp_path / "m", name)
    t = {"method": "lora", "rank": 3, "alpha": 7.0, "targets": targets}
    out = run.train(make_config(tmp_path / "m", sums_file, tmp_path / "r", tuning=t, optim__learning_rate=3e-2))
    c = json.loads((out / "export/adapter_config.json").read_text())
    assert c["target_parameters"] == (
        ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"] if targets == "all-linear" else ["mlp.experts.down_proj"]
    )
    ids = np.random.default_rng(0).integers(3, V, (2, 20))
    got = forward(open_model(str(out)), ids).logits
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        before = base(torch.tensor(ids)).logits.numpy()
        want = peft.PeftModel.from_pretrained(base, out / "export")(torch.tensor(ids)).logits.numpy()
    assert off(want, before) > 1e-3
    assert off(got, want) < 2e-5
    convert.write_model(str(out), tmp_path / "merged")
    assert off(forward(open_model(str(tmp_path / "merged")), ids).logits, want) < 1e-4


def test_an_adapter_on_experts_made_by_peft_goes_on_here(tmp_path, sums_file):
    """Embeddings, experts, a whole head; read, tuned on, and opened in peft again."""
    write(tmp_path / "m", "qwen3_moe")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    c = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(base, c)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora" in n or "modules_to_save" in n:
                p.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    ids = np.random.default_rng(0).integers(3, V, (2, 20))
    with torch.no_grad():
        want = model(torch.tensor(ids)).logits.numpy()
    assert off(forward(open_model(str(tmp_path / "m"), str(tmp_path / "a")), ids).logits, want) < 2e-5
    t = {"method": "lora", "adapter": str(tmp_path / "a")}
    out = run.train(make_config(tmp_path / "m", sums_file, tmp_path / "r", tuning=t, optim__learning_rate=1e-3))
    got = forward(open_model(str(out)), ids).logits
    assert 1e-4 < off(got, want) < 0.5
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(again, out / "export")(torch.tensor(ids)).logits.numpy()
    assert off(got, theirs) < 2e-5
    c = json.loads((out / "export/adapter_config.json").read_text())
    assert (c["r"], c["lora_alpha"], c["modules_to_save"]) == (2, 5.0, ["lm_head"])


@pytest.mark.parametrize("name", MODELS)
def test_experts_through_a_cache(tmp_path, name):
    write(tmp_path / "m", name, torch.bfloat16)
    convert.write_model(str(tmp_path / "m"), tmp_path / "cache", to="orbax")
    ids = np.random.default_rng(0).integers(3, V, (2, 20))
    one, two = (forward(open_model(str(tmp_path / f)), ids).logits for f in ("m", "cache"))
    np.testing.assert_array_equal(one, two)
    convert.write_model(str(tmp_path / "cache"), tmp_path / "back")
    before, after = load.read_folder(tmp_path / "m"), load.read_folder(tmp_path / "back")
    assert set(before) == set(after)
    for n, t in before.items():
        np.testing.assert_array_equal(t.open().view(np.uint8), after[n].open().view(np.uint8))


SCRIPT = """
import json, sys
from pathlib import Path
import jax
from jaxtune import job as jobs, run
from tests.tiny import make_config, on_eight_devices
model, data, out = (Path(a) for a in sys.argv[1:4])
for i, mesh in enumerate(json.loads(sys.argv[4])):
    c = make_config(model, data, out / str(i), mesh=mesh, tuning={"method": "full"}, train__batch_size=8)
    if i == 0:
        state = jobs.prepare(c).state
        print("SPECS", {str(s.sharding.spec) for s in jax.tree.leaves(state.trainable)})
    run.train(c)
"""
MESHES: list[dict[str, int | str]] = [
    {"expert": 2, "fsdp": 2, "tensor": 2},
    {"strategy": "expert", "fsdp": 2},
    {"expert": 2, "context": 2, "fsdp": 2},
]


def test_an_expert_axis_changes_nothing(tmp_path, sums_file):
    """Losses on eight devices, experts split over two, over four (copied: six experts do not divide), and rows
    split along their length."""
    write(tmp_path / "m", "qwen3_moe")
    done = on_eight_devices(SCRIPT, tmp_path / "m", sums_file, tmp_path, json.dumps(MESHES))
    assert "'expert'" in done.stdout.split("SPECS")[1]
    assert "expert 6 over expert 4" in done.stderr
    c = make_config(tmp_path / "m", sums_file, tmp_path / "one", tuning={"method": "full"}, train__batch_size=8)
    want = losses(run.train(c))
    for i in range(len(MESHES)):
        np.testing.assert_allclose(losses(tmp_path / str(i)), want, rtol=1e-5)


def losses(folder):
    return [m["loss"] for m in log.read_metrics(folder / "metrics.jsonl") if "loss" in m]


@pytest.mark.parametrize("pattern", ["layers/2/", "experts/down_proj"])
def test_experts_that_would_train_whole_are_refused(tmp_path, sums_file, pattern):
    write(tmp_path / "m", "mixtral")
    t = {"method": "lora", "train": [pattern]}
    with pytest.raises(UserError, match=r"tuning\.train matches layers/\d/mlp/experts/\w+: PEFT cannot hold experts"):
        jobs.prepare(make_config(tmp_path / "m", sums_file, tmp_path / "r", tuning=t))
