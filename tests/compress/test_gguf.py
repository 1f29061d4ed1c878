"""GGUF files: tensor by tensor as the gguf package reads them, and whole as transformers loads them."""

import json

import numpy as np
import pytest

import jaxtune
from jaxtune import blueprint, log, tuned
from jaxtune.compress import gguf, q4_k
from jaxtune.errors import UserError
from jaxtune.hf import load
from jaxtune.layers import Rope, unbox
from jaxtune.models.families import from_hf
from tests.tiny import write_tiny

package = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.parity import families  # noqa: E402 - needs torch

# what the format has to hold, and what llama.cpp fixes: no window in arch llama, Gemma's periods and scales
OWN = {
    "llama": {}, "llama3": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "phi4_mini": {},
    "qwen3": {"head_dim": 128},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256},  # transformers reads no scalar, and takes 256
    "gemma3": {"query_pre_attn_scalar": 16, "num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 3},
}  # fmt: skip
LOADED = ("llama", "qwen2", "qwen3", "gemma2")  # by transformers, as they are there


def opened(folder, name):
    model = families.write(folder, name, **OWN[name])
    return model, tuned.open_model(str(folder))


def written(m, file, dtype):
    b = m.blueprint
    tensors = blueprint.full_tensors(b, blueprint.boxed(b, m.weights))
    return tensors, gguf.write(file, b.decoder, tensors, b.folder, dtype, "tiny", m.template)


@pytest.mark.parametrize("name", list(OWN))
def test_families_are_held_and_loaded(tmp_path, name):
    _, m = opened(tmp_path / "m", name)
    out, c = tmp_path / "out", m.blueprint.decoder
    out.mkdir()
    tensors, types = written(m, out / "model.gguf", "f16")
    raw = {t.name: t for t in package.GGUFReader(out / "model.gguf").tensors}
    held = gguf.read(out / "model.gguf", c)
    assert set(held) == set(types)
    assert len(raw) == len(types) + (name == "llama3") + 2 * (name == "phi4_mini")
    for hf_name, t in held.items():
        exact = (tensors[hf_name] if hf_name in tensors else tensors["lm_head.weight"]).data()
        rounded = exact.astype(np.float16) if exact.ndim > 1 else exact
        np.testing.assert_allclose(t.open(), rounded.astype(np.float32), atol=1e-6)
    if name not in LOADED:
        return
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32).eval()
    b, ids_BT = m.blueprint, np.random.default_rng(0).integers(3, 250, (2, 12))
    mine = unbox(load.load(load.match(held, b.plain, c.family, c.tied, "file"), b.plain, b.places, c.family))
    ones, at = np.ones_like(ids_BT), np.tile(np.arange(12), (2, 1))
    got = b.model.apply({"params": mine}, ids_BT, ones, at)[0].logits()
    with torch.no_grad():
        np.testing.assert_allclose(got, theirs(torch.tensor(ids_BT)).logits.numpy(), atol=2e-3)


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, monkeypatch):
    def decoder(name):
        kind, own = families.FAMILIES[name]
        return from_hf(getattr(transformers, f"{kind}Config")(**{**families.SIZES, **own}).to_dict())

    for name, said in [
        ("olmo2", "is not written"),
        ("mixtral", "is not written"),
        ("gemma2", "attention is scaled by"),
        ("qwen2_windows", "layers with a window"),
    ]:
        with pytest.raises(UserError, match=said):
            gguf.check(decoder(name))
    warned = []
    monkeypatch.setattr(log, "warn", warned.append)
    assert gguf.check(decoder("mistral")) == "llama"
    assert "knows no window" in warned[0]


@pytest.mark.parametrize("draw", ["normal", "heavy", "positive", "constant"])
def test_q4_k_errs_less_than_q4_0(draw):
    r = np.random.default_rng(0)
    x = {
        "normal": r.normal(size=(8, 512)), "heavy": r.standard_t(3, size=(8, 512)),
        "positive": r.uniform(1, 2, size=(8, 512)), "constant": np.full((8, 512), 0.0),
    }[draw].astype(np.float32)  # fmt: skip
    kinds, held = package.GGMLQuantizationType, q4_k.quantize(x)
    assert held.shape == (8, 2 * q4_k.BYTES)

    def error(data, kind):
        return ((package.quants.dequantize(data, kind) - x).astype(np.float64) ** 2).mean()

    assert error(held, kinds.Q4_K) <= error(package.quants.quantize(x, kinds.Q4_0), kinds.Q4_0)
    if draw == "normal":  # 4 bits over a block's range, about: half a step is a 30th of it
        assert error(held, kinds.Q4_K) ** 0.5 < 0.08


def test_a_folder_for_ollama_measured_as_its_file_is(tmp_path, monkeypatch):
    folder = write_tiny(tmp_path / "m", template=True, embed=256, heads=8, head=32, mlp=96, layers=1, ropes=(Rope(32),))
    warned = []
    monkeypatch.setattr(log, "warn", warned.append)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{a} + {a} = {2 * a}. " * 8}) + "\n" for a in range(30)))
    found = {}
    for dtype in ("q8_0", "q4_k"):
        out = tmp_path / dtype
        report = jaxtune.quantize(folder, out, dtype=dtype, held_data=rows, samples=8, length=64, speed=False)
        reader = package.GGUFReader(out / "model.gguf")
        kinds = {t.name: t.tensor_type.name for t in reader.tensors}
        assert kinds["blk.0.ffn_up.weight"] == dtype.upper()
        assert (kinds["token_embd.weight"], kinds["output_norm.weight"]) == ("Q8_0", "F32")
        assert report["after"]["bytes"] == (out / "model.gguf").stat().st_size < report["before"]["bytes"] / 3
        found[dtype] = abs(report["after"]["loss"] - report["before"]["loss"])
        made = (out / "Modelfile").read_text()
        assert made.startswith("FROM ./model.gguf\nTEMPLATE ")
        fields = reader.fields
        assert fields["general.architecture"].contents() == "llama"
        assert fields["tokenizer.ggml.model"].contents() == "gpt2"
        assert fields["tokenizer.chat_template"].contents() == tuned.open_model(str(folder)).template
        assert len(fields["tokenizer.ggml.tokens"].contents()) == 300
    assert 0 < found["q8_0"] < 0.01
    assert found["q4_k"] < 0.2
    assert "q4_k's blocks: Q5_0" in warned[-1]  # 96 numbers to a row


@pytest.mark.parametrize("name", ["stories260K", "stories656K"])
def test_a_real_models_tokenizer_comes_back(assets, tmp_path, name):
    m = tuned.open_model(str(assets / "models" / name))
    written(m, tmp_path / "model.gguf", "q8_0")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("Once upon a time, there was a little girl named Lily.", "2 + 2 = 4 foxes; naïve café"):
        ids = m.tokenizer(text, add_special_tokens=False).input_ids
        assert theirs(text, add_special_tokens=False).input_ids == ids
    fields = package.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is True
