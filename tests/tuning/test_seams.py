"""Where methods meet other keys: what goes together does, the rest is refused at start."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxtune import blueprint, config, job, overview, run
from jaxtune.errors import UserError
from jaxtune.nodes.noisy import noisy
from jaxtune.tuning import method as m
from tests.tiny import make_config


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tuning": {"targets": ["q_proj"], "train": ["q_proj"]}}, "tuning.train takes all that tuning.targets names"),
        ({"tuning__method": "adalora", "train__ema": 0.9}, "adalora with train.ema is not supported"),
        ({"tuning__method": "lisa", "train__param_dtype": "bfloat16"}, "lisa with train.param_dtype=bfloat16"),
        (
            {"tuning__method": "gradient_select", "train__param_dtype": "bfloat16"},
            "gradient_select with train.param_dty",
        ),
    ],
)
def test_what_would_go_wrong_is_refused(tiny, sums_file, tmp_path, given, words):
    with pytest.raises(UserError) as e:
        job.prepare(make_config(tiny, sums_file, tmp_path / "r", **given))
    assert words in str(e.value)


def test_noise_is_on_the_text_and_a_prefix_still_trains(tiny, sums_file, tmp_path):
    t = {"method": "prefix", "tokens": 2}
    out = run.train(make_config(tiny, sums_file, tmp_path / "r", tuning=t, train__neftune=5.0, train__steps=3))
    assert (out / "export/adapter_model.safetensors").exists()
    j = job.prepare(make_config(tiny, sums_file, tmp_path / "s", tuning=t))
    weights = noisy(m.join(j.state.trainable, j.state.frozen), 5.0)
    assert type(weights["embed_tokens"]["weight"]).__name__ == "Prefix"
    start = blueprint.materialise(j.blueprint, jax.random.key(j.config.train.seed))["embed_tokens"]["weight"]
    k_VLKH = load_file(out / "export/adapter_model.safetensors")["prompt_embeddings"].reshape(2, 2, 2, 2, 8)[:, :, 0]
    assert np.abs(k_VLKH.transpose(1, 2, 0, 3) - np.asarray(start.k_LKVH.value)).min() > 0


def test_an_adapter_is_not_trained_whole_beneath(tiny, sums_file, tmp_path):
    out = run.train(make_config(tiny, sums_file, tmp_path / "r", tuning={"targets": ["q_proj"], "rank": 2}))
    for t, words in (
        ({"adapter": str(out / "export"), "train": ["q_proj"]}, "which .* adapts already"),
        ({"adapter": str(out / "export"), "dora": True}, "is without magnitudes"),
    ):
        with pytest.raises(UserError, match=words):
            job.prepare(make_config(tiny, sums_file, tmp_path / "s", tuning=t))


def test_qlora_takes_the_keys_of_lora():
    recipe = {"tuning": {"method": "lora", "rank": 64, "targets": ["q_proj"]}}
    c = config.load(None, recipe, config.nested({"tuning.method": "qlora"}))
    assert (c.tuning.method, c.tuning.rank, c.tuning.base) == ("qlora", 64, "nf4")


def test_what_trains_at_a_time_is_counted(tiny, sums_file, tmp_path):
    c = make_config(tiny, sums_file, tmp_path / "r", tuning={"method": "lisa", "layers": 1, "train": ["norms"]})
    j = job.prepare(c)
    layer = sum(x.size for x in jax.tree.leaves(j.blueprint.abstract["layers_0-1"])) // 2
    norms = 32 * 2 + 32  # of one layer less those of both, and the last
    assert overview.trained(j) == layer + norms


def test_targets_of_ia3_narrow_alone(tiny, sums_file, tmp_path):
    t = {"method": "ia3", "targets": ["k_proj", "v_proj"]}
    j = job.prepare(make_config(tiny, sums_file, tmp_path / "r", tuning=t))
    assert m.count(j.state.trainable) == 2 * 2 * 16
