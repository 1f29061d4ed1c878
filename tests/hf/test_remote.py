"""Models in object stores: the bytes that are asked for, and no more."""

import json

import fsspec
import jax
import numpy as np
import pytest

from jaxtune import log, run
from jaxtune.convert import write_model
from jaxtune.errors import UserError
from jaxtune.hf import layout, load, remote
from jaxtune.layers import Weight
from tests.tiny import make_config, write_tiny


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A tiny model in shards, in fsspec's memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_model(str(write_tiny(tmp_path / "m", tied=False)), tmp_path / "s", shard_bytes=30_000)
    fs = fsspec.filesystem("memory")
    for f in (tmp_path / "s").iterdir():
        fs.pipe_file(f"/bucket/model/{f.name}", f.read_bytes())
    yield tmp_path / "s"
    fs.rm("/bucket", recursive=True)


def test_it_trains_as_the_local_folder_does(store, tmp_path, sums_file):
    t = {"method": "full"}
    outs = [
        run.train(make_config(source, sums_file, tmp_path / f"r{i}", tuning=t, train__steps=3))
        for i, source in enumerate((store, "memory://bucket/model"))
    ]
    one, two = ([m.get("loss") for m in log.read_metrics(o / "metrics.jsonl")] for o in outs)
    assert one == two
    write_model("memory://bucket/model", tmp_path / "back")
    before, after = load.read_folder(store), load.read_folder(tmp_path / "back")
    assert all((t.open() == after[n].open()).all() for n, t in before.items())
    assert (store / "config.json").read_bytes() == (tmp_path / "back" / "config.json").read_bytes()


@pytest.mark.parametrize("names", [("embed", "mlp"), ("embed", "heads", "head"), ("heads", "head", "embed")])
def test_a_part_needs_only_its_rows(store, monkeypatch, names):
    """Split over what Hugging Face stores as rows, a device reads its share of the bytes."""
    kind, n_in = {"mlp": ("mlp.up_proj", 1), "head": ("self_attn.q_proj", 1), "embed": ("self_attn.o_proj", 2)}[
        names[-1]
    ]
    sizes = {"embed": 32, "mlp": 48, "heads": 4, "head": 8}
    w = Weight(jax.ShapeDtypeStruct(tuple(sizes[n] for n in names), np.float32), names, n_in=n_in)
    name = f"model.layers.1.{kind}.weight"
    tensor = load.read_folder(remote.fetch("memory://bucket/model"))[name]
    want = layout.from_hf(load.read_folder(store)[name].open(), w)
    taken = []
    cat = tensor._store.cat_file

    def counted(path, start=None, end=None, **kw):
        taken.append(end - start)
        return cat(path, start, end, **kw)

    monkeypatch.setattr(tensor._store, "cat_file", counted)
    axis = n_in
    half = w.value.shape[axis] // 2
    for s in (slice(0, half), slice(half, None), slice(None)):
        rest = tuple(s if a == axis else slice(1, 3) for a in range(len(names)))
        np.testing.assert_array_equal(tensor.part(w, rest), want[rest])
    whole = want.nbytes
    assert taken == [whole // 2, whole // 2, whole]


def test_a_damaged_or_missing_store_is_one_line(store, tmp_path):
    fs = fsspec.filesystem("memory")
    [first, *_] = sorted(json.loads((store / "model.safetensors.index.json").read_text())["weight_map"].values())
    blob = fs.cat_file(f"/bucket/model/{first}")
    fs.pipe_file(f"/bucket/model/{first}", blob[:-4])
    with pytest.raises(UserError, match=rf"memory:/bucket/model/{first}: tensor .* does not fit in the file"):
        load.read_folder(remote.fetch("memory://bucket/model"))
    with pytest.raises(UserError, match=r"memory://bucket/nothing: cannot be read \(FileNotFoundError"):
        remote.fetch("memory://bucket/nothing")
    with pytest.raises(UserError, match=r"nope://x: cannot be read \(ValueError"):
        remote.fetch("nope://x")
