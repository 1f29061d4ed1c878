"""Every kind of adapter beside peft: steps, adapter folders both ways, first factors."""

import json

import jax
import numpy as np
import peft
import pytest
import torch

from jaxtune import blueprint, config, convert, sharding, tuning
from jaxtune.errors import UserError
from jaxtune.hf import adapters
from jaxtune.layers import unbox
from jaxtune.tuned import open_model
from jaxtune.tuning import lora
from jaxtune.tuning import method as m
from tests.parity.test_peft import IDS, steps_agree_with_torch, theirs, torch_logits
from tests.parity.test_peft import stories as stories
from tests.tiny import write_tiny
from tests.tuning.test_adapters import FORMS, logits, parse

SMALL = IDS[:, :16] % 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("small") / "m", layers=2, tied=False)


@pytest.mark.parametrize("name", ["dora", "ia3", "vera"])
def test_twenty_steps_agree_with_torch(stories, assets, tmp_path, name):
    t = {
        "dora": {"method": "lora", "rank": 4, "alpha": 8.0, "dora": True},
        "ia3": {"method": "ia3"},
        "vera": {"method": "lora", "rank": 4, "form": "vera"},
    }[name]
    steps_agree_with_torch(stories, assets, tmp_path, t)


def opened_logits(*names):
    opened = open_model(*names)
    return np.asarray(logits(opened.blueprint.model, opened.weights, SMALL))


def exported(folder, t, out):
    """A trained-looking model under a method, and its adapter folder."""
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    b = blueprint.draw(folder, lambda d: tuning.make(t, d), mesh, "float32")
    boxes = blueprint.materialise(b, jax.random.key(0))
    leaves, tree = jax.tree.flatten(boxes)
    labels, keys = jax.tree.leaves(b.labels), jax.random.split(jax.random.key(9), len(leaves))
    noisy = [
        x if found == m.FROZEN else x + 0.1 * jax.random.normal(k, x.shape)
        for x, found, k in zip(leaves, labels, keys, strict=True)
    ]
    boxes = tree.unflatten(noisy)
    out.mkdir()
    dropout, rslora = getattr(t, "dropout", 0.0), getattr(t, "rslora", False)
    nodes = blueprint.adapted(b, boxes)
    adapters.write(out, nodes, m.decoder_names(b.decoder), str(folder), b.decoder.family, {}, dropout, rslora)
    return np.asarray(logits(b.model, unbox(boxes), SMALL))


@pytest.mark.parametrize("name", FORMS)
def test_what_is_exported_opens_in_peft_and_here(folder, tmp_path, name):
    want = exported(folder, parse(FORMS[name]), tmp_path / "a")
    base = torch_logits(theirs(folder), SMALL)
    assert np.abs(want - base).max() > 1e-3
    opened = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "a")
    np.testing.assert_allclose(torch_logits(opened, SMALL), want, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(opened_logits(str(tmp_path / "a")), want, atol=1e-4, rtol=1e-4)
    convert.write_model(str(tmp_path / "a"), tmp_path / "merged")
    np.testing.assert_allclose(torch_logits(theirs(tmp_path / "merged"), SMALL), want, atol=1e-4, rtol=1e-4)


def test_principal_parts_leave_as_lora_of_twice_the_rank(folder, tmp_path):
    exported(folder, parse({"init": "pissa", "rank": 3, "rslora": True}), tmp_path / "a")
    c = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (c["peft_type"], c["r"], c["use_rslora"]) == ("LORA", 6, True)
    assert c["lora_alpha"] / 6**0.5 == pytest.approx(16 / 3**0.5)


MODULES = ["q_proj", "o_proj", "down_proj", "lm_head"]
THEIRS = {
    "dora": peft.LoraConfig(
        r=4, use_dora=True, target_modules=MODULES, init_lora_weights=False, rank_pattern={"layers.1.mlp.down_proj": 2}
    ),
    "ia3": peft.IA3Config(target_modules=MODULES, feedforward_modules=["down_proj"], init_ia3_weights=False),
    "vera": peft.VeraConfig(r=4, target_modules=MODULES, init_weights=False),
    "loha": peft.LoHaConfig(r=4, alpha=6, target_modules=MODULES, init_weights=False, alpha_pattern={"o_proj": 3}),
    "lokr": peft.LoKrConfig(r=2, alpha=6, target_modules=MODULES, init_weights=False, rank_pattern={"q_proj": 8}),
    "lokr both": peft.LoKrConfig(
        r=1, alpha=3, target_modules=MODULES, init_weights=False, decompose_both=True, decompose_factor=4
    ),
    "adalora": peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, target_modules=MODULES[:3], init_lora_weights=False, total_step=9
    ),
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor")  # peft's word on an adapter with no rank left
@pytest.mark.parametrize("name", THEIRS)
def test_what_peft_saved_is_read(folder, tmp_path, name):
    torch.manual_seed(0)
    model = peft.get_peft_model(theirs(folder), THEIRS[name])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and "magnitude" not in str(p):
                p.copy_(p + 0.1 * torch.rand_like(p))
    if name == "adalora":  # some ranks of some layers are gone, all of one

        def kept(n):
            return [False] * 4 if "layers.0.mlp" in n else [i % 2 == 0 or "layers.1" in n for i in range(4)]

        ranks = {n: kept(n) for n, _ in model.base_model.model.named_parameters() if "lora_E" in n}
        model.base_model.resize_modules_by_rank_pattern(ranks, "default")
        model.peft_config["default"].rank_pattern = {n.replace(".default", ""): x for n, x in ranks.items()}
    model.eval()
    want = torch_logits(model, SMALL)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    got = opened_logits(str(folder), str(tmp_path / "a"))
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)
    convert.write_model(str(folder), tmp_path / "merged", adapter=str(tmp_path / "a"))
    np.testing.assert_allclose(torch_logits(theirs(tmp_path / "merged"), SMALL), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_first_factors_are_pefts(init):
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(12, 8, bias=False))
    w = layer[0].weight.detach().numpy().copy()
    c = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=init)
    made = peft.get_peft_model(layer, c).base_model.model[0]
    a_Ir, b_rO = lora.pissa(w.T, 3, 2.0) if init == "pissa" else lora.olora(w.T, 3)
    want_a, want_b = (x["default"].weight.detach().numpy() for x in (made.lora_A, made.lora_B))
    sign = np.sign((np.asarray(a_Ir).T * want_a).sum(1))
    np.testing.assert_allclose(np.asarray(a_Ir).T * sign[:, None], want_a, atol=1e-5)
    np.testing.assert_allclose(np.asarray(b_rO).T * sign, want_b, atol=1e-5)
    np.testing.assert_allclose(w - 2 * (a_Ir @ b_rO).T, made.base_layer.weight.detach().numpy(), atol=1e-5)


def test_random_matrices_that_were_not_saved_are_asked_for(folder, tmp_path):
    with pytest.warns(UserWarning, match="project"):
        c = peft.VeraConfig(r=4, target_modules=["q_proj"], save_projection=False)
    peft.get_peft_model(theirs(folder), c).save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match="was saved without VeRA's random matrices.*save_projection=True"):
        open_model(str(folder), str(tmp_path / "a"))
