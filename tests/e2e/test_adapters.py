"""Runs with adapters other than plain LoRA: trained, exported, opened, gone on from."""

import json

import jax
import numpy as np
import pytest

from jaxtune import run
from jaxtune.errors import UserError
from jaxtune.tuned import open_model
from tests.tiny import make_config


def train(model, data, out, **tuning):
    return run.train(make_config(model, data, out, train__steps=2, optim__learning_rate=3e-2, tuning=tuning))


def test_a_dora_run_is_gone_on_from(tiny, sums_file, tmp_path):
    first = train(tiny, sums_file, tmp_path / "a", rank=2, dora=True, targets="q_proj|down_proj", base="nf4", group=16)
    adapter = str(first / "export")
    second = train(tiny, sums_file, tmp_path / "b", adapter=adapter, dora=True)
    c = json.loads((second / "export/adapter_config.json").read_text())
    assert (c["use_dora"], c["r"], sorted(c["target_modules"])) == (True, 2, ["down_proj", "q_proj"])
    one, two = (open_model(str(x)).weights["layers_0-1"]["mlp"]["down_proj"]["weight"] for x in (first, second))
    assert 0 < np.abs(one.magnitude - two.magnitude).max() < 0.2
    with pytest.raises(UserError, match="tuning.adapter: .* is of type IA3; only LoRA adapters"):
        other = train(tiny, sums_file, tmp_path / "c", method="ia3")
        train(tiny, sums_file, tmp_path / "d", adapter=str(other / "export"))


def test_a_pissa_run_resumes_and_leaves_its_base_alone(tiny, sums_file, tmp_path):
    """The frozen pair is made again from the base; what comes out is as if it had never stopped."""
    tuning = {"init": "pissa", "rank": 2, "targets": ["q_proj"]}
    straight = train(tiny, sums_file, tmp_path / "a", **tuning)
    c = make_config(tiny, sums_file, tmp_path / "b", train__steps=2, optim__learning_rate=3e-2, tuning=tuning,
                    checkpoint__every=1)  # fmt: skip
    run.train(c)
    for gone in ("export", "checkpoints/2"):
        (tmp_path / "b" / gone).rename(tmp_path / gone.replace("/", "_"))
    run.train(c)
    a, b = (open_model(str(x)).weights for x in (straight, tmp_path / "b"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    node = a["layers_0-1"]["self_attn"]["q_proj"]["weight"]
    assert node.a.shape[-1] == 4
    half = np.split(np.asarray(node.a), 2, -1)
    assert 0 < np.abs(half[0] - half[1]).max() < 0.2
