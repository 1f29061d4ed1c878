"""Useful FLOPs by rule, against a count by hand and the compiled step's."""

from collections.abc import Callable

import jax
import pytest

from jaxtune import config, steps
from jaxtune.planning import counting, reading, subject

P_HEAD = 49152 * 576
P_LAYERS = 30 * (576 * 576 * 2 + 2 * 576 * 192 + 3 * 576 * 1536)
T = 64


@pytest.fixture(scope="module")
def of() -> Callable[..., counting.Count]:
    def count(**tuning: object) -> counting.Count:
        c = config.load(None, {"model": "smollm2-135m", "data": {"max_length": T}, "tuning": tuning})
        return counting.count(subject.imagined(c, jax.devices()[:1]), T)

    return count


def test_full_tuning_is_6_p(of: Callable) -> None:
    n = of(method="full")
    assert n.forward + n.inputs + n.weights == 6 * (P_LAYERS + P_HEAD)
    assert n.attention == 3 * 30 * 4 * 576 * (T + 1) / 2


def test_adapters_are_4_p_and_their_own_6(of: Callable) -> None:
    n = of(method="lora", rank=4)
    own = 30 * 4 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    assert n.forward + n.inputs == 4 * (P_LAYERS + P_HEAD + own)
    assert n.weights == 2 * own


def test_a_quantised_base_multiplies_as_if_it_were_not(of: Callable) -> None:
    assert of(method="qlora", rank=4) == of(method="lora", rank=4)


def test_layers_below_all_that_trains_cost_only_their_forward_pass(of: Callable) -> None:
    n = of(method="freeze", last=3)
    assert n.forward == 2 * (P_LAYERS + P_HEAD)
    assert n.inputs == pytest.approx(2 * (P_LAYERS / 10 + P_HEAD))
    assert n.weights == pytest.approx(2 * P_LAYERS / 10)
    assert n.attention == (27 + 3 * 3) * 4 * 576 * (T + 1) / 2


def test_the_compiled_step_multiplies_as_the_rule_says(tiny, sums_file, tmp_path) -> None:
    from tests.tiny import make_config

    c = make_config(tiny, sums_file, tmp_path, tuning__method="full")
    job = subject.imagined(c, jax.devices()[:1])
    r = reading.read(steps.compile_step(job).as_text(), dict(job.mesh.shape))
    n = counting.count(job, 32)
    whole = n.total - n.attention + n.attention * 2 * 32 / 33  # rows this short are one block: no score is left out
    assert sum(r.flops.values()) == pytest.approx(4 * 32 * whole, rel=0.02)
