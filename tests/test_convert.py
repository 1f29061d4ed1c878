import json
import os
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from jaxtune import log, run
from jaxtune.convert import write_model
from jaxtune.errors import UserError
from jaxtune.hf import files, load
from jaxtune.models import families
from jaxtune.models.presets import PARAMETERS, PRESETS
from jaxtune.tuned import open_model
from tests.tiny import make_config, write_tiny


def same(a, b):
    x, y = open_tensors(a), open_tensors(b)
    assert set(x) == set(y)
    for n, t in x.items():
        assert t.dtype == y[n].dtype
        np.testing.assert_array_equal(*(np.ascontiguousarray(z.open()).view(np.uint8) for z in (t, y[n])))


def open_tensors(folder):
    from jaxtune.models.decoder import abstract_weights

    c = families.from_hf(json.loads((folder / "config.json").read_text()))
    return load.read_folder(folder, abstract_weights(c), c.family)


@pytest.mark.parametrize("changes", [{}, {"tied": False, "layers": 3}])
def test_there_and_back_through_a_cache(tmp_path, changes):
    folder = write_tiny(tmp_path / "m", **changes)
    (folder / "LICENSE").write_text("as is")
    write_model(str(folder), tmp_path / "cache", to="orbax")
    assert not list((tmp_path / "cache").glob("*.safetensors"))
    same(folder, tmp_path / "cache")
    write_model(str(tmp_path / "cache"), tmp_path / "back", shard_bytes=20_000)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    same(folder, tmp_path / "back")
    for f in ("config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (folder / f).read_bytes() == (tmp_path / "back" / f).read_bytes()


def test_a_cache_trains_as_its_model_does(tmp_path, sums_file):
    """Also with frozen layers, which groups them anew; and what it exports is the same."""
    folder = write_tiny(tmp_path / "m", layers=3)
    write_model(str(folder), tmp_path / "cache", to="orbax")
    outs = []
    for source in (folder, tmp_path / "cache"):
        t = {"method": "freeze", "last": 1}
        outs.append(run.train(make_config(source, sums_file, tmp_path / f"r-{source.name}", tuning=t)))
    one, two = ([m.get("loss") for m in log.read_metrics(o / "metrics.jsonl")] for o in outs)
    assert one == two
    same(outs[0] / "export", outs[1] / "export")


def test_another_dtype(tmp_path):
    folder = write_tiny(tmp_path / "m")
    write_model(str(folder), tmp_path / "half", dtype="bfloat16")
    want = {n: t.open().astype(ml_dtypes.bfloat16) for n, t in open_tensors(folder).items()}
    for n, t in open_tensors(tmp_path / "half").items():
        np.testing.assert_array_equal(t.open().view(np.uint16), want[n].view(np.uint16))
    old, new = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "half"))
    assert {k for k in old if old[k] != new[k]} == {"torch_dtype"}


def test_foreign_formats(tmp_path, assets):
    source = assets / "models/stories260K"
    write_model(str(source / "original/stories260K.bin"), tmp_path / "m")
    same(source, tmp_path / "m")
    ours, theirs = open_model(str(tmp_path / "m")), open_model(str(source))
    text = "Once upon a time, Lily saw a café."
    assert ours.tokenizer(text).input_ids == theirs.tokenizer(text).input_ids


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_what_was_begun_is_gone_on_with(tmp_path, monkeypatch, to):
    """A kill half-way leaves whole parts, which the next call keeps; another source starts afresh."""
    folder = write_tiny(tmp_path / "m", layers=4)
    taken = []
    read = files.Tensor.open

    def stops(self):
        taken.append(self)
        if len(taken) == 25:
            raise KeyboardInterrupt
        return read(self)

    monkeypatch.setattr(files.Tensor, "open", stops)
    with pytest.raises(KeyboardInterrupt):
        write_model(str(folder), tmp_path / "out", to=to, shard_bytes=10_000)
    assert not (tmp_path / "out").exists()
    half = tmp_path / ".out.partial"
    parts = {f.name for f in half.glob("model-*.safetensors")} | {f.name for f in half.glob("weights/*")}
    assert parts
    taken[:] = [None] * 1000
    write_model(str(folder), tmp_path / "out", to=to, shard_bytes=10_000)
    again = len(taken) - 1000
    taken[:] = [None] * 1000
    write_model(str(folder), tmp_path / "straight", to=to, shard_bytes=10_000)
    assert again < len(taken) - 1000
    same(tmp_path / "straight", tmp_path / "out")
    assert not half.exists()
    assert not [f for f in (tmp_path / "out").iterdir() if f.name.startswith(".")]


def test_a_real_kill(tmp_path):
    """SIGKILL at any moment: the folder is not there or whole, and the same command ends it."""
    folder = write_tiny(tmp_path / "m", layers=12)
    command = [sys.executable, "-m", "jaxtune", "convert", str(folder), str(tmp_path / "out"), "--shard-size", "1e-5"]
    p = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial/model-0000[5-9]*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    if not (tmp_path / "out").exists():
        assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    same(folder, tmp_path / "out")


def damage(folder, f):
    arrays = {n: t.open().copy() for n, t in load.read_folder(folder).items()}
    f(arrays)
    files.write_folder(folder, {n: files.Entry(a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_nan_and_infinity_are_named(tmp_path, monkeypatch, bad, dtype):
    folder = write_tiny(tmp_path / "m")

    def poison(arrays):
        for n in arrays:
            arrays[n] = arrays[n].astype(dtype)
        arrays["model.layers.1.mlp.up_proj.weight"][3, 4] = bad

    with monkeypatch.context() as m:
        m.setattr(files, "finite", lambda x: True)
        damage(folder, poison)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight: holds NaN or infinity"):
        open_model(str(folder))
    for to in ("hf", "orbax"):
        with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight: holds NaN or infinity"):
            write_model(str(folder), tmp_path / "out", to=to)
    assert {f.name for f in tmp_path.iterdir()} == {"m"}


def test_a_dtype_that_is_too_small_is_told(tmp_path):
    folder = write_tiny(tmp_path / "m")
    damage(folder, lambda arrays: arrays["model.norm.weight"].__setitem__(0, 1e5))
    with pytest.raises(UserError, match=r"model.norm.weight: holds NaN or infinity in float16"):
        write_model(str(folder), tmp_path / "out", dtype="float16")
    assert {f.name for f in tmp_path.iterdir()} == {"m"}


def test_tensors_that_two_shards_hold(tmp_path):
    folder = write_tiny(tmp_path / "m")
    write_model(str(folder), tmp_path / "s", shard_bytes=20_000)
    shards = sorted((tmp_path / "s").glob("model-*.safetensors"))
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(UserError, match=r"which another shard holds too"):
        open_model(str(tmp_path / "s"))
    shards[1].unlink()
    with pytest.raises(UserError, match=rf"{shards[1].name}: no such file"):
        open_model(str(tmp_path / "s"))


def test_a_table_of_another_size_is_named(tmp_path):
    folder = write_tiny(tmp_path / "m")
    c = json.loads((folder / "config.json").read_text())
    for rows in (290, 310):
        (folder / "config.json").write_text(json.dumps({**c, "vocab_size": rows}))
        with pytest.raises(
            UserError, match=rf"mis-shaped: model.embed_tokens.weight \[300, 32\], config wants \[{rows}"
        ):
            open_model(str(folder))


def test_a_folder_of_links_opens(tmp_path):
    """As the hub's cache has it."""
    write_model(str(write_tiny(tmp_path / "m")), tmp_path / "blobs", shard_bytes=30_000)
    (tmp_path / "snapshot").mkdir()
    for f in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / f.name).symlink_to(f"../blobs/{f.name}")
    same(tmp_path / "m", tmp_path / "snapshot")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    """One line; what was written stays, and the next call goes on."""
    import orbax.checkpoint as ocp

    folder = write_tiny(tmp_path / "m")
    save, calls = ocp.Checkpointer.save, []

    def full(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")
        return save(self, *args, **kwargs)

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    with pytest.raises(UserError, match=r"out: cannot write .*No space left.*run it again to go on"):
        write_model(str(folder), tmp_path / "out", to="orbax")
    assert len(list((tmp_path / ".out.partial/weights").iterdir())) >= 2
    write_model(str(folder), tmp_path / "out", to="orbax")
    assert len(calls) == 5
    same(folder, tmp_path / "out")


def test_another_source_is_not_mixed_in(tmp_path, monkeypatch):
    """An adapter on a base that changed since starts afresh."""
    from tests.tiny import write_jsonl

    folder = write_tiny(tmp_path / "m", layers=3)
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "1 +", "completion": f" {i}"} for i in range(8)])
    out = run.train(make_config(folder, data, tmp_path / "r", train__steps=1))
    read, taken = files.Tensor.open, []

    def stops(self):
        taken.append(self)
        if len(taken) == 60:
            raise KeyboardInterrupt
        return read(self)

    with monkeypatch.context() as m:
        m.setattr(files.Tensor, "open", stops)
        with pytest.raises(KeyboardInterrupt):
            write_model(str(out / "export"), tmp_path / "out", shard_bytes=5000)
    damage(folder, lambda arrays: arrays.update({n: a * 2 for n, a in arrays.items()}))
    write_model(str(out / "export"), tmp_path / "out", shard_bytes=5000)
    write_model(str(out / "export"), tmp_path / "straight", shard_bytes=5000)
    same(tmp_path / "straight", tmp_path / "out")


def test_a_tokenizer_larger_than_the_table(tmp_path, sums_file):
    folder = write_tiny(tmp_path / "m", vocab=260)
    words = r"the tokenizer has 279 tokens, the model 260 embeddings; .*vocabulary.grow=true"
    with pytest.raises(UserError, match=words):
        run.train(make_config(folder, sums_file, tmp_path / "r"))
    with pytest.raises(UserError, match=words):
        write_model(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run.train(make_config(folder, sums_file, tmp_path / "r", vocabulary__grow=True, tuning={"method": "full"}))
    assert json.loads((tmp_path / "r/export/config.json").read_text())["vocab_size"] == 279


def test_pickles_of_tensors_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    folder = write_tiny(tmp_path / "m", tied=False)
    state = {n: torch.tensor(t.open().copy()) for n, t in load.read_folder(folder).items()}
    (tmp_path / "p").mkdir()
    files.copy_files(folder, tmp_path / "p", files.SIDE_FILES)
    torch.save(state, tmp_path / "p" / "pytorch_model.bin")
    write_model(str(tmp_path / "p"), tmp_path / "out")
    same(folder, tmp_path / "out")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name):
    import jax

    from jaxtune.layers import unbox
    from jaxtune.models.decoder import abstract_weights

    c = families.from_hf(PRESETS[name], name)
    assert sum(x.size for x in jax.tree.leaves(unbox(abstract_weights(c)))) == PARAMETERS[name]
    assert families.from_hf(families.to_hf(c), name) == c


def test_some_of_a_models_layers(tmp_path):
    """A student of its teacher's layers; its config says so, whatever form it is written in."""
    folder = write_tiny(tmp_path / "m", layers=3)
    write_model(str(folder), tmp_path / "few", layers=[0, 2], dtype="bfloat16")
    whole, few = open_tensors(folder), open_tensors(tmp_path / "few")
    told = json.loads((tmp_path / "few" / "config.json").read_text())
    assert told["num_hidden_layers"] == 2
    assert told["model_type"] == json.loads((folder / "config.json").read_text())["model_type"]
    assert len(few) == len(whole) - (len(whole) - 2) // 3
    for name, t in few.items():
        old = whole[name.replace("layers.1.", "layers.2.")].open()
        np.testing.assert_array_equal(t.open(), old.astype(ml_dtypes.bfloat16))
    assert "its layers 0, 2 alone" in (tmp_path / "few" / "README.md").read_text()
    for layers, message in (([2, 0], "rising"), ([0, 3], "0 to 2")):
        with pytest.raises(UserError, match=message):
            write_model(str(folder), tmp_path / "x", layers=layers)
