import types

import pytest

from jaxtune import job, overview
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


def test_a_file_is_no_model_folder(tiny):
    with pytest.raises(UserError, match=r"model\.safetensors: is a file; give the folder that it lies in"):
        job.model_folder(str(tiny / "model.safetensors"))
