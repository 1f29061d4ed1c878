"""Quantised folders: written as their formats say, read back with the logits of the quantised model, and reported."""

import json
import shutil

import jax
import numpy as np
import pytest

import jaxtune
from jaxtune import convert, tuned
from jaxtune.cli import main
from jaxtune.compress import quantize as verb
from jaxtune.compress import rounding
from jaxtune.errors import UserError
from jaxtune.hf import files, quantized
from jaxtune.layers import Rope
from jaxtune.nodes.grid import Scheme, dense, nearest, with_int8_products
from jaxtune.weights import einsum
from tests.tiny import write_jsonl, write_tiny


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose matrices the GPTQ format can pack."""
    return write_tiny(
        tmp_path_factory.mktemp("wide") / "model", embed=64, kv_heads=4, head=16, mlp=96, ropes=(Rope(16, context=128),)
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    r = np.random.default_rng(0)
    rows = [{"text": " ".join(f"{a} + {b} = {a + b}" for a, b in r.integers(0, 50, (12, 2)))} for _ in range(60)]
    return write_jsonl(tmp_path_factory.mktemp("text") / "rows.jsonl", rows)


def logits(model):
    ids_BT = np.random.default_rng(0).integers(3, 290, (2, 12))
    ones, at = np.ones_like(ids_BT), np.tile(np.arange(12), (2, 1))
    run = jax.jit(lambda w: model.blueprint.model.apply({"params": w}, ids_BT, ones, at)[0].logits())
    return np.asarray(run(model.weights))


def unpacked(tensors, module, bits):
    """A matrix of GPTQ's tensors, word by word and bit by bit, from the format's description alone."""
    words, zeros, scales, group = (tensors[f"{module}.{n}"].open() for n in ("qweight", "qzeros", "scales", "g_idx"))
    n_in, n_out, each = len(group), words.shape[1], 32 // bits
    out = np.zeros((n_out, n_in))
    for i in range(n_in):
        for o in range(n_out):
            code = (int(words[i // each, o]) >> (bits * (i % each))) % 2**bits
            zero = (int(zeros[group[i], o // each]) >> (bits * (o % each))) % 2**bits + 1
            out[o, i] = float(scales[group[i], o]) * (code - zero)
    return out


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"method": "gptq", "group": 32, "act_order": True}, 4),
        ({"method": "awq", "group": 16, "symmetric": False}, 4),
    ],
    ids=["gptq", "awq"],
)
def test_a_gptq_folder_holds_the_quantised_model(wide, text, tmp_path, options, bits):
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    report = jaxtune.quantize(wide, out, **options, data=text, samples=8, length=64, speed=False)
    assert report["after"]["bytes"] < report["before"]["bytes"]
    assert report["after"]["perplexity"] == pytest.approx(report["before"]["perplexity"], rel=0.2)
    stored, given = files.read_header(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    model = tuned.open_model(str(out))
    for module, w in [("self_attn.k_proj", 0), ("mlp.down_proj", 1)]:
        name = f"model.layers.{w}.{module}"
        assert {stored[f"{name}.{n}"].dtype.name for n in ("qweight", "qzeros", "g_idx")} == {"int32"}
        held = np.asarray(model.weights["layers_0-1"][module.split(".")[0]][module.split(".")[1]]["weight"][w])
        held = held.reshape(stored[f"{name}.g_idx"].shape[0], -1).T
        np.testing.assert_allclose(unpacked(stored, name, bits), held, rtol=1e-6, atol=1e-7)
    theirs = transformers.AutoConfig.from_pretrained(out).quantization_config
    theirs = transformers.GPTQConfig.from_dict(theirs) if isinstance(theirs, dict) else theirs
    assert (theirs.bits, theirs.group_size) == (bits, options["group"] or -1)
    assert (theirs.desc_act, theirs.sym, theirs.format) == (
        options.get("act_order", False), options.get("symmetric", True), "gptq",
    )  # fmt: skip
    assert given["quantization_config"]["quant_method"] == "gptq"
    assert json.loads((out / "quantize.json").read_text()) == report
    if options["method"] != "gptq":
        return
    convert.write_model(str(out), tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    np.testing.assert_array_equal(logits(tuned.open_model(str(tmp_path / "dense"))), logits(model))


def test_rows_that_were_rounded_already_are_written_as_they_are(wide, tmp_path):
    first = jaxtune.quantize(wide, tmp_path / "a", group=32, speed=False)
    jaxtune.quantize(tmp_path / "a", tmp_path / "b", group=32, speed=False)
    assert "perplexity" not in first["after"]
    a, b = (files.read_header(tmp_path / n / "model.safetensors") for n in "ab")
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name].open(), b[name].open())
    plain = files.read_header(wide / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].open()
    rounded = unpacked(a, "model.layers.1.mlp.down_proj", 8)
    np.testing.assert_allclose(rounded, dense(nearest(plain, Scheme("int8", 32))), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{"dtype": "fp8"}, {"method": "smoothquant"}], ids=str)
def test_a_folder_in_8_bits_computes_what_was_measured(wide, text, tmp_path, options):
    out = tmp_path / "out"
    jaxtune.quantize(wide, out, **options, data=text, samples=8, length=64, speed=False)
    given = json.loads((out / "config.json").read_text())["quantization_config"]
    stored = files.read_header(out / "model.safetensors")
    codes, scale = (stored[f"model.layers.1.mlp.up_proj.{n}"].open() for n in ("weight", "weight_scale"))
    model = tuned.open_model(str(out))
    up = model.weights["layers_0-1"]["mlp"]["up_proj"]["weight"]
    smooth = options.get("method") == "smoothquant"
    assert (codes.dtype.name, scale.shape) == ("int8" if smooth else "float8_e4m3fn", (96, 1))
    held = np.asarray((up.base if smooth else up)[1]).T
    np.testing.assert_allclose(codes.astype(np.float32) * scale, held, rtol=1e-6)
    assert given["format"] == ("int-quantized" if smooth else "float-quantized")
    assert ("input_activations" in given["config_groups"]["group_0"]) == smooth
    exact = logits(tuned.open_model(str(wide)))
    assert 0 < np.abs(logits(model) - exact).max() < 0.15 * np.abs(exact).max()


def test_int8_products_are_those_of_the_rounded_numbers():
    r = np.random.default_rng(0)
    w, x = (r.normal(size=s).astype(np.float32) for s in ((32, 24), (1, 5, 32)))
    grid = nearest(w.T, Scheme("int8", 0))
    node = with_int8_products({"layers_0-0": {"up_proj": {"weight": np.asarray(dense(grid)).T}}})
    got = einsum("btd,df->btf", jax.numpy.asarray(x), node["layers_0-0"]["up_proj"]["weight"])
    step = np.abs(x).max(-1, keepdims=True).astype(np.float64) / 127
    exact = (np.rint(x / step) * step) @ np.asarray(dense(grid), np.float64).T
    np.testing.assert_allclose(got, exact, rtol=1e-3, atol=1e-3)
    assert np.abs(got - x @ w).max() < 0.1 * np.abs(x @ w).max()


def test_damaged_folders_are_told(wide, tmp_path):
    jaxtune.quantize(wide, tmp_path / "a", group=32, speed=False)
    held = {n: t.open() for n, t in files.read_header(tmp_path / "a" / "model.safetensors").items()}
    name = "model.layers.0.mlp.up_proj"

    def refused(changes, config=None):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        new = {n: x for n, x in {**held, **changes}.items() if x is not None}
        files.write(
            tmp_path / "b" / "model.safetensors",
            {n: files.Entry(x.shape, x.dtype, lambda x=x: x) for n, x in new.items()},
        )
        given = json.loads((tmp_path / "b" / "config.json").read_text())
        given["quantization_config"] |= config or {}
        (tmp_path / "b" / "config.json").write_text(json.dumps(given))
        with pytest.raises(UserError) as e:
            tuned.open_model(str(tmp_path / "b"))
        return str(e.value)

    assert "has no scales" in refused({f"{name}.scales": None})
    assert "groups that are not there" in refused({f"{name}.g_idx": held[f"{name}.g_idx"] + 7})
    assert "do not fit each other" in refused({f"{name}.qzeros": held[f"{name}.qzeros"][:1]})
    assert "not 3 bits" in refused({}, {"bits": 3})
    assert "quant_method" in refused({}, {"quant_method": "awq"})
    assert quantized.rounds_activations(None) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "gptw"}, "--method 'gptw' is not known"),
        ({"dtype": "fp8", "format": "gptq"}, "take --format hf for fp8"),
        ({"method": "smoothquant", "dtype": "int4"}, "holds|is for"),
        ({"dtype": "int4", "format": "hf"}, "take --format gptq"),
        ({"method": "gptq", "format": "gguf"}, "not by gptq"),
        ({"dtype": "q4_k", "format": "gptq"}, "--dtype 'q4_k' is not known"),
        ({"method": "awq", "act_order": True}, "--act-order is for --method gptq"),
        ({"dtype": "fp8", "symmetric": False}, "--asymmetric is for --format gptq"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        verb.wanted(**options)


def test_what_the_format_cannot_hold_is_refused(tiny, wide, text, tmp_path, capsys):
    def said(*arguments):
        with pytest.raises(SystemExit) as e:
            main(["quantize", *map(str, arguments)])
        assert e.value.code == 2
        return capsys.readouterr().err

    assert "packs outputs by 32" in said(tiny, tmp_path / "out", "--group", 16, "--no-speed")
    assert "give --data FILE" in said(wide, tmp_path / "out", "--method", "gptq", "--group", 32)
    assert "give the rows of its questions" in said(wide, tmp_path / "out", "--group", 32, "--task", "maths")
    assert not (tmp_path / "out").exists()


def test_the_verb_prints_before_and_after(wide, text, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "sums.jsonl", [{"prompt": f"{a} + 1 =", "completion": f"{a + 1}"} for a in range(3)])
    arguments = ["--group", "32", "--held-data", rows, "--task", "dialogue", "--samples", "2", "--length", "64"]
    with pytest.raises(SystemExit) as e:
        main(["quantize", str(wide), str(tmp_path / "out"), *map(str, arguments)])
    assert not e.value.code
    shown = capsys.readouterr().out
    for word in ("before", "after", "perplexity", "bytes", "decode_tokens_per_second", "dialogue_"):
        assert word in shown
    report = json.loads((tmp_path / "out" / "quantize.json").read_text())
    assert report["measured_on"] == 2 or report["measured_on"] == 1
    assert report["after"]["decode_tokens_per_second"] > 0


def test_a_layer_sees_what_the_rounded_layers_before_it_give(wide):
    m = tuned.open_model(str(wide))
    c = m.blueprint.decoder
    ids_BT = np.random.default_rng(0).integers(3, 290, (2, 16))
    batch = {"ids_BT": ids_BT, "segment_BT": np.ones((2, 16), int), "position_BT": np.tile(np.arange(16), (2, 1))}
    new, grids = rounding.rounded(c, m.weights, rounding.How("gptq", Scheme("int4", 32)), [batch])
    assert set(grids) == {f"layers/{i}/{n}" for i in range(2) for n in rounding.names_of(c)}
    w = np.asarray(new["layers_0-1"]["self_attn"]["o_proj"]["weight"][1]).reshape(64, -1).T
    np.testing.assert_allclose(dense(grids["layers/1/self_attn/o_proj"]), w, rtol=1e-6)
