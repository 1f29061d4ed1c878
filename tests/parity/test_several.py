"""Several adapters of one base, beside peft: merged with weights, written as one, and compared over shared arrays."""

import json

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from jaxtune import convert, run, tuned
from jaxtune.errors import UserError
from jaxtune.hf import several
from jaxtune.tuning import method as m
from jaxtune.weights import path_name
from tests.parity.families import write
from tests.parity.test_families import off
from tests.parity.test_families import run as forward
from tests.tiny import make_config, write_tiny

IDS = np.random.default_rng(0).integers(3, 300, (2, 20))
FIRST = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj", "down_proj"]}
SECOND = {
    "r": 3, "lora_alpha": 9, "use_rslora": True, "target_modules": ["q_proj", "up_proj", "embed_tokens"],
    "rank_pattern": {"layers.1.self_attn.q_proj": 2},
}  # fmt: skip


def base_of(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def ours(folder, adapter=None):
    return forward(tuned.open_model(str(folder), None if adapter is None else str(adapter)), IDS).logits


def write_adapter(base, folder, seed=0, **options):
    """A random adapter, made by peft; also what trains whole is away from the base's."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(
        base_of(base), peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **options)
    )
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "modules_to_save" in n:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A base and two adapters that differ in everything: targets, ranks, ranks by layer, scales, the table."""
    root = tmp_path_factory.mktemp("several")
    write_tiny(root / "m", layers=3, tied=False)
    write_adapter(root / "m", root / "one" / "export", 1, **FIRST)
    write_adapter(root / "m", root / "two", 2, **SECOND)
    return root


@pytest.fixture(scope="module")
def summed(three):
    """The logits of peft's own sum, 1 · one + 0.3 · two, and of the base. It takes `one`'s config: no rsLoRA."""
    base = base_of(three / "m")
    before = logits(base)
    model = peft.PeftModel.from_pretrained(base, three / "one" / "export", adapter_name="one")
    model.load_adapter(three / "two", adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [1.0, 0.3], "sum", combination_type="cat")
    model.set_adapter("sum")
    return logits(model), before


def given(three):
    return several.weighted([str(three / "one" / "export"), f"{three / 'two'}=0.3"])


def test_several_are_merged_as_peft_adds_them(three, summed, tmp_path):
    want, before = summed
    assert off(want, before) > 1e-2
    convert.write_model(str(three / "m"), tmp_path / "merged", given(three))
    assert off(logits(base_of(tmp_path / "merged")), want) < 2e-5
    assert off(ours(tmp_path / "merged"), want) < 2e-5


def test_several_become_one_adapter(three, summed, tmp_path):
    want, _ = summed
    convert.write_adapter(str(three / "m"), tmp_path / "a", given(three))
    assert off(logits(peft.PeftModel.from_pretrained(base_of(three / "m"), tmp_path / "a")), want) < 2e-5
    assert off(ours(tmp_path / "a"), want) < 2e-5
    c = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert {c["r"], *c["rank_pattern"].values()} == {3, 4, 6, 7}
    assert c["base_model_name_or_path"] == str(three / "m")


def test_a_weight_of_a_single_adapter(three, tmp_path):
    model = peft.PeftModel.from_pretrained(base_of(three / "m"), three / "one" / "export")
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scale_layer(-0.5)
    convert.write_model(str(three / "m"), tmp_path / "merged", {str(three / "one" / "export"): -0.5})
    assert off(ours(tmp_path / "merged"), logits(model)) < 2e-5


def test_adapters_of_experts_add_up(tmp_path):
    """There peft adds none up: beside the sum of what two merged models differ by."""
    write(tmp_path / "m", "qwen3_moe")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    for i, rank in enumerate([2, 3]):
        targets = {"target_modules": [["q_proj", "k_proj", "v_proj"], []][i], "target_parameters": names}
        write_adapter(tmp_path / "m", tmp_path / str(i), i, r=rank, lora_alpha=4, **targets)
        convert.write_model(str(tmp_path / "m"), tmp_path / f"m{i}", str(tmp_path / str(i)))
    weights = {str(tmp_path / "0"): 1.0, str(tmp_path / "1"): 0.5}
    convert.write_model(str(tmp_path / "m"), tmp_path / "both", weights)
    before, one, two, both = (base_of(tmp_path / f).state_dict() for f in ("m", "m0", "m1", "both"))
    for n, w in before.items():
        np.testing.assert_allclose(both[n], w + (one[n] - w) + 0.5 * (two[n] - w), atol=1e-5)
    convert.write_adapter(str(tmp_path / "m"), tmp_path / "a", weights)
    got = logits(peft.PeftModel.from_pretrained(base_of(tmp_path / "m"), tmp_path / "a"))
    assert off(got, ours(tmp_path / "both")) < 2e-5


def test_what_one_adapter_brings_whole_comes_along(three, tmp_path):
    write_adapter(three / "m", tmp_path / "w", 3, r=2, target_modules=["k_proj"], modules_to_save=["lm_head", "norm"])
    weights = {str(tmp_path / "w"): 1.0, str(three / "one" / "export"): 0.5}
    model = peft.PeftModel.from_pretrained(base_of(three / "m"), tmp_path / "w", adapter_name="w")
    convert.write_model(str(three / "m"), tmp_path / "merged", weights)
    convert.write_adapter(str(three / "m"), tmp_path / "a", weights)
    opened = peft.PeftModel.from_pretrained(base_of(three / "m"), tmp_path / "a")
    assert off(logits(opened), ours(tmp_path / "merged")) < 2e-5
    head = model.base_model.model.lm_head.modules_to_save["w"].weight
    np.testing.assert_array_equal(base_of(tmp_path / "merged").lm_head.weight.detach(), head.detach())


REFUSED = {
    "whole, with a weight": ({"modules_to_save": ["lm_head"]}, {}, 0.5, "brings lm_head.weight whole, which has no w"),
    "twice whole": (
        {"modules_to_save": ["lm_head", "model.norm"]}, {"modules_to_save": ["norm"]}, 1, "brings model.norm whole"
    ),
    "whole and adapted": (
        {"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}, 1, "lm_head whole, which .*/b changes too"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_added_up_is_refused(three, tmp_path, case):
    one, two, weight, words = REFUSED[case]
    for name, own in (("a", one), ("b", two)):
        write_adapter(three / "m", tmp_path / name, **{"r": 2, "target_modules": ["q_proj"], **own})
    weights = {str(tmp_path / "a"): weight, str(tmp_path / "b"): 1}
    for write_ in (convert.write_model, convert.write_adapter):
        with pytest.raises(UserError, match=words):
            write_(str(three / "m"), tmp_path / "out", weights)
    assert not (tmp_path / "out").exists()


def test_other_kinds_of_adapters_are_not_added_up(three, tmp_path, monkeypatch):
    monkeypatch.setattr(several.Adapter, "__init__", told_of_dora)
    with pytest.raises(UserError, match="x: DORA adapters are not added up, LORA ones are; merge it alone"):
        several.read({"x": 1.0, "y": 1.0})


def told_of_dora(self, folder):
    self.folder, self.config, self._whole = folder, {"peft_type": "LORA", "use_dora": True}, {}


def test_weights_of_adapters_as_they_are_written(tmp_path):
    (tmp_path / "a=0.5").mkdir()
    assert several.weighted([str(tmp_path / "a=0.5"), "b=-2", "c"]) == {str(tmp_path / "a=0.5"): 1, "b": -2, "c": 1}
    for texts, words in ((["a=x"], "'x' is no weight"), (["a=nan"], "no weight"), (["a", "a=2"], "given twice")):
        with pytest.raises(UserError, match=words):
            several.weighted(texts)
    with pytest.raises(UserError, match="no adapter is given"):
        convert.write_adapter("m", tmp_path / "out", {})


def test_adapters_share_the_arrays_of_their_base(three, tmp_path):
    """One has other ranks in one layer, one brings a head and a norm."""
    whole = ["lm_head", "model.norm"]
    write_adapter(three / "m", tmp_path / "w", 3, r=2, target_modules=["k_proj"], modules_to_save=whole)
    folders = [str(three / "two"), str(tmp_path / "w")]
    models = tuned.open_models(str(three / "m"), folders)
    assert list(models) == ["two", "w", "none"]
    base = arrays(models["none"])
    own = {"two": set(), "w": {"lm_head/weight", "norm/weight"}, "none": set()}
    for name, model in models.items():
        assert model.generator.weights is model.weights  # nothing is copied for generation
        beneath = arrays(model)
        assert set(beneath) == set(base)
        assert {n for n, x in beneath.items() if x is not base[n]} == own[name]
        want = ours(three / "m", dict(zip(models, folders, strict=False)).get(name))
        np.testing.assert_allclose(forward(model, IDS).logits, want, atol=1e-5)


def arrays(model):
    leaves = jax.tree_util.tree_leaves_with_path(m.strip(model.weights))
    return {path_name(p): x for p, x in leaves}


def test_elsewhere_layers_are_grouped_as_suits_all(three, monkeypatch):
    """As on accelerators: where ranks differ by layer, groups end."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    folders = [str(three / "one" / "export"), str(three / "two")]
    models = tuned.open_models(str(three / "m"), folders)
    assert {x.blueprint.decoder.groups for x in models.values()} == {(1, 1, 1)}
    only = tuned.open_models(str(three / "m"), folders[:1])
    assert {x.blueprint.decoder.groups for x in only.values()} == {(3,)}
    one, none = (arrays(only[n]) for n in ("one", "none"))
    assert all(one[n] is none[n] for n in none)


def test_a_merged_model_is_tuned_on(three, sums_file, tmp_path):
    convert.write_model(str(three / "m"), tmp_path / "merged", given(three))
    out = run.train(make_config(tmp_path / "merged", sums_file, tmp_path / "r"))
    got = ours(out)
    assert off(got, ours(tmp_path / "merged")) > 1e-3
    opened = peft.PeftModel.from_pretrained(base_of(tmp_path / "merged"), out / "export")
    assert off(logits(opened), got) < 2e-5
