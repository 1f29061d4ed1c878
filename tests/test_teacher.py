"""Runs with a teacher, from a config to an export, on tiny models; the teacher is wider than the student."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from jaxtune import columns, job, log, overview, planning, run
from jaxtune.data.batches import Beside, Rows
from jaxtune.errors import Interrupted, UserError
from jaxtune.hf import load
from tests.tiny import make_config, on_eight_devices, write_tiny

ALL = {
    "features": {"layers": [[0, 0], [1, 2]], "weight": 0.1},
    "attention": {"layers": [[1, 2]], "weight": 0.5},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("teacher") / "wide", seed=5, layers=3, embed=48, heads=6, mlp=64)


def losses(folder, key="loss"):
    return [m[key] for m in log.read_metrics(folder / "metrics.jsonl") if key in m]


def config(tiny, sums_file, out, teacher, distill=None, **dotted):
    return make_config(tiny, sums_file, out, distill={"teacher": str(teacher), **(distill or {})}, **dotted)


def tensors(folder):
    return {n: t.open() for n, t in load.read_folder(folder).items()}


SHARDED = """
import sys
from pathlib import Path
from jaxtune import run
from jaxtune.config import load
run.train(load(Path(sys.argv[1])))
"""


def test_a_run_with_all_of_it(tiny, teacher, sums_file, tmp_path):
    """Losses fall; what is learned along is saved and not exported; a killed run goes on bit by bit; and on eight
    devices the losses are those of one."""
    options = {
        "data__validation": 8, "evaluate__every": 6, "checkpoint__every": 3, "train__accumulation": 2,
        "train__batch_size": 8, "tuning__method": "full", "data__packing": True,
        "optim__schedule": "constant", "optim__warmup": 0,
    }  # fmt: skip
    c = config(tiny, sums_file, tmp_path / "a", teacher, ALL | {"on_policy": 0.34}, **options)
    run.train(c)
    metrics = log.read_metrics(tmp_path / "a" / "metrics.jsonl")
    assert {"data_loss", "kl", "features", "attention", "accuracy"} <= set(metrics[1])
    held = [m for m in metrics if "eval_kl" in m]
    assert held[-1]["eval_loss"] < held[0]["eval_loss"] - 0.5
    assert {m["step"] for m in metrics if m.get("data_loss") == 0} == {3, 6}
    j = job.prepare(c)
    saved = job.tuning_method.student(j.state.saved()["trainable"])
    assert {"matching", "teacher"} & set(saved) == set()
    assert set(j.state.trainable["matching"]) == {"0", "1"}
    names = json.loads((tmp_path / "a" / "checkpoints" / "6" / "manifest.json").read_text())["about"]["state"]
    assert any("matching/0/weight" in n for n in names)
    assert not any("teacher" in n for n in names)
    exported = tensors(tmp_path / "a" / "export")
    assert set(exported) == set(tensors(tiny))

    shutil.copytree(tmp_path / "a", tmp_path / "b")  # as one killed after step 3
    for gone in ("checkpoints/6", "export"):
        shutil.rmtree(tmp_path / "b" / gone)
    again = c.model_copy(update={"output": str(tmp_path / "b")})
    run.train(again)
    for name, x in tensors(tmp_path / "b" / "export").items():
        np.testing.assert_array_equal(x, exported[name])
    other = again.distill.model_copy(update={"teacher": str(tiny), "features": None, "attention": None})
    with pytest.raises(UserError, match="teacher_digest"):
        run.train(again.model_copy(update={"distill": other}))

    few = options | {"evaluate__every": 99, "checkpoint__every": 99, "train__steps": 2}
    few["mesh"] = {"fsdp": 4, "tensor": 2}
    eight = config(tiny, sums_file, tmp_path / "c", teacher, ALL, **few)
    (tmp_path / "c.json").write_text(eight.model_dump_json())
    on_eight_devices(SHARDED, tmp_path / "c.json")
    for key in ("loss", "kl", "features", "attention", "grad_norm"):
        np.testing.assert_allclose(losses(tmp_path / "c", key), losses(tmp_path / "a", key)[:2], rtol=2e-4)


def test_columns_are_written_once_and_teach_as_the_live_teacher(tiny, teacher, sums_file, tmp_path, monkeypatch):
    options = {"data__validation": 8, "evaluate__every": 3, "tuning__rank": 4, "train__steps": 3, "data__packing": True}
    kept = {"columns": str(tmp_path / "kept")}
    live = config(tiny, sums_file, tmp_path / "live", teacher, **options)
    run.train(live)
    every = config(tiny, sums_file, tmp_path / "every", teacher, kept | {"top_k": 300}, **options)
    with pytest.raises(Interrupted, match="go on"):
        columns.write(job.prepare(every), lambda: True)
    assert [f.suffix for f in (tmp_path / "kept").iterdir()] == [".partial"]
    run.train(every)
    for key, rtol in (("loss", 2e-3), ("kl", 5e-3), ("eval_kl", 5e-3), ("eval_loss", 2e-3)):
        np.testing.assert_allclose(losses(tmp_path / "every", key), losses(tmp_path / "live", key), rtol=rtol)
    rows = job.prepare(every).data.rows
    files = rows.beside.folder
    assert sum(f.stat().st_size for f in files.iterdir()) - rows.beside.nbytes(rows.tokens) == 2 * 128  # heads of .npy
    assert rows.beside.nbytes(1) == 300 * 2 + 301 * 2
    monkeypatch.setattr(columns, "likeliest", None)  # nothing is written again
    columns.write(job.prepare(every))

    few = config(tiny, sums_file, tmp_path / "few", teacher, kept | {"top_k": 8}, **options)
    facts = dict(overview.validate(few))
    assert "8 likeliest tokens to be written" in facts["teacher"]
    monkeypatch.setattr(columns.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"lower distill.top_k"):
        columns.check_disk(job.prepare(few))


def test_the_plan_counts_the_teacher(tiny, teacher, sums_file, tmp_path):
    c = config(tiny, sums_file, tmp_path / "x", teacher, ALL)
    alone = make_config(tiny, sums_file, tmp_path / "x")
    (with_, without), size = (planning.plan(x, ["cpu:1"], "rule")[0] for x in (c, alone)), job.prepare(c).teacher
    bytes_ = overview.held(size.blueprint.abstract)
    assert with_.state.frozen == without.state.frozen + bytes_
    assert with_.state.trained == without.state.trained + 2 * 32 * 48 * 4
    assert with_.count.forward > 2 * without.count.forward
    assert with_.count.inputs == without.count.inputs
    few = config(tiny, sums_file, tmp_path / "x", teacher, {"top_k": 8})
    assert planning.plan(few, ["cpu:1"], "rule")[0].state.frozen == without.state.frozen


def test_what_cannot_teach_is_refused(tiny, teacher, sums_file, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    words = json.loads((other / "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    (a, i), (b, k) = sorted(vocab.items(), key=lambda x: x[1])[-2:]
    vocab[a], vocab[b] = k, i
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match=rf"token {i} is {b!r} there and {a!r} here"):
        job.prepare(config(tiny, sums_file, tmp_path / "x", other))
    for distill, message, more in (
        ({"features": {"layers": [[0, 3]]}}, r"\[0, 3\] is no pair of layers; the student has 2, the teacher 3", {}),
        ({"top_k": 301}, "the teacher has 300 tokens", {}),
        ({"top_k": 8}, "data.streaming does not count", {"data__streaming": True}),
        ({}, "virtual tokens", {"tuning": {"method": "prompt", "tokens": 2}}),
        ({"attention": {"layers": [[0, 0]]}}, "a prefix hides", {"tuning": {"method": "prefix", "tokens": 2}}),
        ({"on_policy": 0.5, "top_k": 8}, "asks a live teacher", {}),
        ({}, "distill goes with objective sft and pretrain", {"objective": "classification"}),
        ({"kind": "js"}, "distill.kind", {}),
        ({"featurs": {}}, "did you mean 'features'", {}),
    ):
        with pytest.raises(UserError, match=message):
            job.prepare(config(tiny, sums_file, tmp_path / "x", teacher, distill, **more))


def test_columns_of_rows_that_are_trained_on_and_held_out_are_written_once(tmp_path):
    rows = Rows([], [], [], 8, beside=Beside(tmp_path / "columns", {}))
    data = SimpleNamespace(train=rows, validation=dataclasses.replace(rows))
    job = SimpleNamespace(teacher=SimpleNamespace(live=False), data=data)
    assert [beside.folder for _, _, beside in columns.missing(job)] == [tmp_path / "columns"]
