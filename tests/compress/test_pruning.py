"""Whole models pruned: which weights go, what is written of them, and what the verb says."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtune import cli
from jaxtune.compress import prune, pruning, structured, writing
from jaxtune.compress.prune import Plan
from jaxtune.compress.sparse import Target
from jaxtune.errors import UserError
from jaxtune.hf import files
from jaxtune.models.inside import look
from tests.tiny import write_jsonl, write_tiny

TEXTS = [{"text": f"the fox eats {i} berries and {i + 1} more"} for i in range(60)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> writing.Opened:
    return writing.open_for(str(write_tiny(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", TEXTS))


@pytest.fixture(scope="module")
def batches(tiny: writing.Opened, text: str) -> list[dict[str, np.ndarray]]:
    rows = writing.rows_for(tiny, text, 8, 32)
    assert len(rows) == 8
    assert rows.full > 0.5
    return writing.batches(rows, 4)


def by_name(o: writing.Opened, weights: Any) -> dict[str, np.ndarray]:
    return {n: t.data() for n, t in writing.tensors(o, weights).items()}


def is_matrix(name: str) -> bool:
    return "_proj" in name


def test_a_run_is_calibrated_on_what_it_was_trained_on(tmp_path: Path, tiny: writing.Opened, text: str) -> None:
    (tmp_path / "config.yaml").write_text(f"model: demo\ndata: {{train: {text}, validation: 30}}\n")
    rows = writing.rows_for(tiny._replace(name=str(tmp_path)), None, None, 64)
    assert len(rows.examples) == 30
    assert rows.length == 64


def test_wanda_is_of_each_output_by_weight_and_input(tiny: writing.Opened, batches: list) -> None:
    o, c = tiny, tiny.model.blueprint.decoder
    now = by_name(o, prune.prune(c, o.weights, batches, Plan("wanda", Target(0.5))))
    sums: dict[str, Any] = {}
    inputs = jax.jit(lambda w, b: look(c, w, b)[1].inputs)
    for b in batches:
        for n, x_LBTI in inputs(o.weights, b).items():
            x_MI = np.asarray(x_LBTI[0], np.float64)[b["segment_BT"] > 0]
            sums[n] = sums.get(n, 0) + (x_MI**2).sum(0)
    for n, norm_I in sums.items():
        name = f"model.layers.0.{n.replace('/', '.')}.weight"
        w_OI = o.source.tensors[name].data().astype(np.float64)
        if "self_attn/o_proj" in n or "mlp" in n:
            continue  # behind what was pruned in the layer, or the same inputs
        order = np.argsort(np.abs(w_OI) * np.sqrt(norm_I), 1)
        expected = w_OI.copy()
        np.put_along_axis(expected, order[:, : w_OI.shape[1] // 2], 0, 1)
        np.testing.assert_array_equal(now[name], expected.astype(np.float32), err_msg=name)
    same = [n for n in now if not is_matrix(n)]
    assert same
    for n in same:
        np.testing.assert_array_equal(now[n], o.source.tensors[n].data())


def test_global_is_one_threshold_and_budgets_and_skips_hold(tiny: writing.Opened) -> None:
    o, c = tiny, tiny.model.blueprint.decoder
    plan = Plan("magnitude", Target(0.4), "global", {"layers/0/mlp/up": 0.75}, ["k_proj"])
    now = by_name(o, prune.prune(c, o.weights, [], plan))
    was = {n: t.data() for n, t in o.source.tensors.items()}
    gone, kept = [], []
    for n in filter(is_matrix, now):
        if "k_proj" in n:
            np.testing.assert_array_equal(now[n], was[n])
        elif n == "model.layers.0.mlp.up_proj.weight":
            assert (now[n] == 0).mean() == 0.75
        else:
            gone.append(np.abs(was[n])[now[n] == 0])
            kept.append(np.abs(was[n])[now[n] != 0])
    every = np.concatenate(gone).size + np.concatenate(kept).size
    assert np.concatenate(gone).size == round(0.4 * every)
    assert np.concatenate(gone).max() <= np.concatenate(kept).min()


def test_experts_go_by_magnitude_and_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    o = writing.open_for(str(write_tiny(tmp_path, family="mixtral", layers=1, experts=4, top_k=2, tied=False)))
    rows = writing.batches(writing.rows_for(o, str(write_jsonl(tmp_path / "r.jsonl", TEXTS)), 4, 32), 4)
    now = by_name(o, prune.prune(o.model.blueprint.decoder, o.weights, rows, Plan("wanda", Target(0.5, 2, 4))))
    assert "experts see tokens of their own" in capsys.readouterr().err
    experts = [n for n in now if ".experts." in n]
    assert len(experts) == 4 * 3
    for n in experts:
        w, new = np.abs(o.source.tensors[n].data().reshape(-1, 4)), now[n].reshape(-1, 4)
        assert ((new != 0).sum(1) == 2).all()
        assert (np.where(new != 0, w, 9).min(1) >= np.where(new == 0, w, 0).max(1)).all()
    assert (now["model.layers.0.block_sparse_moe.gate.weight"] != 0).all()


SHAPES = {"heads": (2, 1, 48, 8), "channels": (2, 2, 24, 8), "layers": (1, 2, 48, 8)}


@pytest.mark.parametrize("method", pruning.STRUCTURED)
def test_a_smaller_model_computes_what_was_meant(
    tmp_path: Path, tiny: writing.Opened, text: str, batches: list, method: str
) -> None:
    made = pruning.make(tiny, batches, pruning.Asked(method, 0.5))
    writing.write(tmp_path / "small", tiny, made.tensors, made.changes)
    small = writing.open_for(str(tmp_path / "small"))
    c = small.model.blueprint.decoder
    assert (c.layers, c.kv_heads, c.mlp, c.head) == SHAPES[method]
    if method == "channels":  # taken out as heads are
        return
    rows = writing.rows_for(small, text, 8, 32)
    meant = made.model.scores(rows, 4, "pretrain", made.weights)
    assert small.scores(rows, batch_size=4)["loss"] == pytest.approx(meant["loss"], rel=1e-5)


def test_heads_and_channels_are_judged_by_what_they_give(tiny: writing.Opened, batches: list) -> None:
    rng = np.random.default_rng(0)
    w_OI, x_MI = rng.normal(size=(6, 12)), rng.normal(size=(50, 12))
    expected = [np.sum((x_MI[:, g * 3 : g * 3 + 3] @ w_OI[:, g * 3 : g * 3 + 3].T) ** 2) for g in range(4)]
    found = structured.energy(jax.numpy.asarray(w_OI), jax.numpy.asarray(x_MI.T @ x_MI), 4)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    c = tiny.model.blueprint.decoder
    one, two = (structured.distances(c, tiny.weights, batches, span, True) for span in (1, 2))
    assert (len(one), len(two)) == (2, 1)
    hidden = [np.asarray(x, np.float64) for x in _hidden(tiny, batches[0])]
    real = batches[0]["segment_BT"] > 0
    a, b = hidden[0][real], hidden[1][real]
    cos = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    mine = structured.distances(c, tiny.weights, batches[:1], 1, False)
    assert mine[0] == pytest.approx((1 - cos).mean(), rel=1e-4)


def _hidden(o: writing.Opened, batch: dict) -> list[Any]:
    inside = jax.jit(lambda w, b: look(o.model.blueprint.decoder, w, b)[1].hidden_LBTD)(o.weights, batch)
    return [np.asarray(o.weights["embed_tokens"]["weight"])[batch["ids_BT"]], *inside]


def test_the_verb_writes_a_folder_and_says_what_went(
    tmp_path: Path, tiny: writing.Opened, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "out"
    options = ["--data", text, "--samples", "8", "--length", "32", "--batch-size", "4", "--validation", text]
    with pytest.raises(SystemExit) as done:
        cli.main(["prune", tiny.name, str(to), "--method", "sparsegpt", "--pattern", "2:4", *options])
    assert done.value.code == 0
    said = capsys.readouterr().out
    assert "all 50.0 %" in said
    assert "perplexity" in said
    for name, t in files.read_header(to / "model.safetensors").items():
        if is_matrix(name):
            assert ((t.open().reshape(-1, 4) != 0).sum(1) == 2).all()
    report = json.loads((to / "prune.json").read_text())
    assert report["bytes"]["packed"] < report["bytes"]["after"] == report["bytes"]["before"]
    assert "2:4" in (to / "README.md").read_text()
    with pytest.raises(SystemExit) as done:
        cli.main(
            ["prune", tiny.name, str(tmp_path / "sw"), "--method", "magnitude,wanda", "--sweep", "0.3,2:4", *options]
        )
    assert done.value.code == 0
    points = json.loads((tmp_path / "sw/sweep.json").read_text())["points"]
    assert [(p["method"], p["pattern"] or p["sparsity"]) for p in points] == [
        ("dense", 0.0), ("magnitude", 0.3), ("magnitude", "2:4"), ("wanda", 0.3), ("wanda", "2:4"),
    ]  # fmt: skip
    assert (tmp_path / "sw/sweep.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"method": "wanda", "sparsity": 0.5}, "no data is given"),
        ({"method": "wnda", "sparsity": 0.5}, "did you mean"),
        ({"method": "layers", "sparsity": 0.9, "data": "TEXT"}, "no layers of 2 would be left"),
        ({"method": "layers", "pattern": "2:4"}, "takes --sparsity alone"),
        ({"method": "magnitude", "pattern": "2:4", "scope": "global"}, "leave --scope"),
        ({"method": "sparsegpt", "sparsity": 0.5, "scope": "global", "data": "TEXT"}, "--scope outliers"),
        ({"method": "magnitude", "pattern": "3:7"}, "not a multiple"),
        ({"method": "magnitude", "sparsity": 0.5, "skip": ["nothing"]}, "--skip"),
    ],
)
def test_what_does_not_go_together_is_told(
    tmp_path: Path, tiny: writing.Opened, text: str, asked: dict[str, Any], words: str
) -> None:
    asked = {k: text if v == "TEXT" else v for k, v in asked.items()}
    with pytest.raises(UserError, match=words):
        pruning.write(tiny.name, tmp_path / "out", pruning.Asked(**asked, length=32, samples=4))
    assert not (tmp_path / "out").exists()
