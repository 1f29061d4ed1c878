import types

import jax
import pytest

from jaxtune import job, overview, steps
from jaxtune.errors import UserError
from jaxtune.layers import unbox
from jaxtune.tuning import method as m
from tests.tiny import make_config


@pytest.mark.parametrize("t", [{}, {"base": "nf4", "group": 16}, {"base": "int8", "group": 16}])
def test_a_quantised_base_has_the_parameters_that_it_had(tiny, sums_file, tmp_path, capsys, t):
    prepared = job.prepare(make_config(tiny, sums_file, tmp_path / "r", tuning={"method": "lora", "rank": 2, **t}))
    base, adapters = m.count(unbox(prepared.blueprint.plain)), m.count(prepared.state.trainable)
    assert (m.count(prepared.blueprint.abstract) == base + adapters) == (t == {})
    overview.introduce(prepared, types.SimpleNamespace(memory_analysis=lambda: None))
    said = capsys.readouterr().out
    assert f"{base:,} parameters" in said
    assert f"{adapters:,} of {base + adapters:,} train" in said


@pytest.mark.parametrize(
    "keys",
    [
        {"optim__name": "muon", "train__ema": 0.9},
        {"optim__name": "adamw8bit", "optim__offload": True},
        {"optim__name": "schedule_free", "optim__schedule": "constant", "optim__offload": True},
        {"optim__name": "adafactor"},
    ],
)
def test_a_step_takes_over_the_memory_of_the_state(tiny, sums_file, tmp_path, keys):
    prepared = job.prepare(make_config(tiny, sums_file, tmp_path / "r", tuning={"method": "full"}, **keys))
    reused = steps.compile_step(prepared).memory_analysis().alias_size_in_bytes
    single = sum(4 for x in jax.tree.leaves(prepared.state) if x.size == 1)  # Adafactor's of what is not factored
    assert overview.held(prepared.state) - single <= reused <= overview.held(prepared.state)


def test_a_file_is_no_model_folder(tiny):
    with pytest.raises(UserError, match=r"model\.safetensors: is a file; give the folder that it lies in"):
        job.model_folder(str(tiny / "model.safetensors"))


def test_what_differs_in_rates_decay_warmup_and_seed_is_one_program(tiny, sums_file, tmp_path):
    def program(**keys):
        c = make_config(tiny, sums_file, tmp_path / "r", **{"optim__weight_decay": 0.1, **keys})
        return steps.lower_step(job.prepare(c)).as_text()

    one = program()
    other = {"optim__learning_rate": 3e-5, "optim__weight_decay": 0.01, "optim__warmup": 3, "optim__schedule": "wsd"}
    assert program(**other, optim__final=0.1, train__seed=7) == one
    assert program(optim__beta1=0.8) != one
