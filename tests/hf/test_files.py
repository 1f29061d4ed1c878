import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune import blueprint, sharding
from jaxtune.config import Mesh
from jaxtune.errors import UserError
from jaxtune.hf import files, layout, load
from jaxtune.layers import Weight
from jaxtune.tuning.method import Method, leave
from tests.tiny import write_tiny

FLOATS = [np.float32, np.float16, ml_dtypes.bfloat16]


def entry(a):
    return files.Entry(a.shape, a.dtype, lambda: a)


@given(
    st.dictionaries(
        st.text("abc.", min_size=1, max_size=6),
        st.tuples(st.sampled_from(FLOATS), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    )
)
@settings(max_examples=30, deadline=None)
def test_what_is_written_is_read_and_the_library_agrees(tmp_path_factory, spec):
    import safetensors.numpy

    file = tmp_path_factory.mktemp("st") / "x.safetensors"
    rng = np.random.default_rng(0)
    arrays = {n: rng.normal(size=shape).astype(d) for n, (d, shape) in spec.items()}
    files.write(file, {n: entry(a) for n, a in arrays.items()})
    got = files.read_header(file)
    assert set(got) == set(arrays)
    for n, a in arrays.items():
        np.testing.assert_array_equal(got[n].open().astype(np.float32), a.astype(np.float32))
        assert got[n].dtype == a.dtype
    theirs = safetensors.numpy.load_file(file)
    assert {n: a.shape for n, a in theirs.items()} == {n: a.shape for n, a in arrays.items()}


def test_shards_and_their_index(tmp_path):
    arrays = {f"w{i}": np.full((4, 4), i, np.float32) for i in range(5)}
    files.write_folder(tmp_path, {n: entry(a) for n, a in arrays.items()}, shard_bytes=130)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 64
    got = load.read_folder(tmp_path)
    assert all((got[n].open() == a).all() for n, a in arrays.items())


@pytest.mark.parametrize("damage", ["cut", "header", "length", "offsets", "dtype", "empty"])
def test_a_damaged_file_is_named(tmp_path, damage):
    file = tmp_path / "model.safetensors"
    files.write(file, {"w": entry(np.ones((4, 4), np.float32))})
    blob = file.read_bytes()
    n = int.from_bytes(blob[:8], "little")
    header = blob[8 : 8 + n]
    changed = {
        "cut": blob[:-8],
        "header": blob[:8] + b"x" * n + blob[8 + n :],
        "length": (2**50).to_bytes(8, "little") + blob[8:],
        "offsets": blob[:8] + header.replace(b"[0,64]", b"[0,99]") + blob[8 + n :],
        "dtype": blob[:8] + header.replace(b'"F32"', b'"Q32"') + blob[8 + n :],
        "empty": b"",
    }[damage]
    assert changed != blob
    file.write_bytes(changed)
    with pytest.raises(UserError, match=r"model.safetensors: .*again"):
        load.read_folder(tmp_path)


def test_an_index_cannot_lead_out_of_the_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../x.safetensors"}}')
    with pytest.raises(UserError, match="leads out of the folder"):
        load.read_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "no zip archive"),
        ("consolidated.00.pth", "`jaxtune convert"),
        ("x.txt", "is this a Hugging Face model folder"),
    ],
)
def test_folders_without_safetensors(tmp_path, name, words):
    (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=words):
        load.read_folder(tmp_path)


def draw(folder, **kw):
    return blueprint.draw(
        folder, lambda _: Method(leave, [("", "train")]), sharding.make_mesh(Mesh(), jax.devices()[:1]), "float32"
    )


def change(folder, tmp_path, f):
    shutil.copytree(folder, tmp_path / "m")
    arrays = {n: t.open().copy() for n, t in load.read_folder(folder).items()}
    f(arrays)
    files.write_folder(tmp_path / "m", {n: entry(a) for n, a in arrays.items()})
    return tmp_path / "m"


def test_one_error_lists_all_that_does_not_fit(tiny, tmp_path):
    def damage(arrays):
        del arrays["model.norm.weight"], arrays["model.layers.1.mlp.up_proj.weight"]
        arrays["model.extra.weight"] = np.ones(2, np.float32)
        arrays["model.layers.0.self_attn.q_proj.weight"] = np.ones((3, 3), np.float32)

    with pytest.raises(UserError) as e:
        draw(change(tiny, tmp_path, damage))
    text = str(e.value)
    assert "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight" in text
    assert "unexpected: model.extra.weight" in text
    assert "mis-shaped: model.layers.0.self_attn.q_proj.weight [3, 3], config wants [32, 32]" in text


def test_old_buffers_are_passed_over_and_twins_must_agree(tiny, tmp_path):
    def add(arrays):
        arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()

    folder = change(tiny, tmp_path, add)
    b = draw(folder)
    out = blueprint.full_tensors(b, blueprint.materialise(b, jax.random.key(0)))
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(out)

    def differ(arrays):
        add(arrays)
        arrays["lm_head.weight"] += 1

    (tmp_path / "2").mkdir()
    with pytest.raises(UserError, match="tie_word_embeddings is set, but lm_head.weight differs"):
        draw(change(tiny, tmp_path / "2", differ))


@pytest.mark.parametrize("changes", [{}, {"tied": False, "qkv_bias": True, "o_bias": True, "mlp_bias": True}])
def test_a_folder_comes_back_bit_by_bit(tmp_path, changes):
    folder = write_tiny(tmp_path / "m", **changes)
    b = draw(folder)
    out = blueprint.full_tensors(b, blueprint.materialise(b, jax.random.key(0)))
    stored = load.read_folder(folder)
    assert set(out) == set(stored)
    for n, t in stored.items():
        np.testing.assert_array_equal(out[n].data(), t.open())


def test_layouts_are_each_others_inverse():
    w = Weight(jax.ShapeDtypeStruct((5, 4, 3), np.float32), ("embed", "heads", "head"), n_in=1)
    hf = np.arange(60, dtype=np.float32).reshape(12, 5)
    ours = layout.from_hf(hf, w)
    assert ours.shape == (5, 4, 3)
    assert np.shares_memory(ours, hf)
    np.testing.assert_array_equal(layout.to_hf(np.asarray(ours), w), hf)
    o = Weight(jax.ShapeDtypeStruct((4, 3, 5), np.float32), ("heads", "head", "embed"), n_in=2)
    np.testing.assert_array_equal(layout.to_hf(layout.from_hf(hf.T.copy(), o), o), hf.T)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), files.whole(target) as f:
        (f / "a").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with files.whole(target) as f:
        (f / "a").write_text("x")
    assert (target / "a").exists()
    with pytest.raises(UserError, match="exists and is not empty"), files.whole(target):
        pass


def test_a_full_disk_leaves_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "out"
    with files.whole(target) as f:
        (f / "a").write_text("old")

    def full(fd):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"), files.whole(target, replace=True) as f:
        files.write(f / "model.safetensors", {"w": entry(np.ones(3, np.float32))})
    assert (target / "a").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
