import re
import shutil

import jax
import numpy as np
import pytest

from jaxtune import from_run, job, run
from jaxtune.blueprint import materialise
from jaxtune.checkpoint import Checkpoints
from jaxtune.errors import UserError
from jaxtune.hf import files
from tests.processes import together
from tests.tiny import make_config

FOLDER = """
import sys
from jaxtune import distributed, job
distributed.initialize()
job.model_folder(sys.argv[1])
"""


def read_all(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_a_lora_run_starts_from_the_exact_weights_of_a_full_run(tiny, sums_file, tmp_path):
    full = run.train(make_config(tiny, sums_file, tmp_path / "full", tuning={"method": "full"}, train__steps=2))
    assert from_run.is_run(full)
    assert not from_run.is_run(tiny)
    checkpoints = Checkpoints(full / "checkpoints", read_only=True)
    j = job.prepare(make_config(tiny, sums_file, full, tuning={"method": "full"}, train__steps=2))
    trained = checkpoints.restore(2, j.state.saved())[0]["trainable"]
    checkpoints.close()
    folder = job.model_folder(str(full))
    assert folder.parent == full
    assert re.fullmatch("model-2-[0-9a-f]{8}", folder.name)
    stored = {n: t.open() for n, t in files.read_header(folder / "model.safetensors").items()}
    assert {x.dtype for x in stored.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(stored["model.norm.weight"], trained["norm"]["weight"])
    again = shutil.copytree(full, tmp_path / "again", ignore=shutil.ignore_patterns("model-*"))
    together(FOLDER, 2, 2, again)
    assert read_all(again / folder.name) == read_all(folder)
    lora = make_config(
        full, sums_file, tmp_path / "lora", tuning={"method": "lora", "rank": 2}, train__compute_dtype="bfloat16"
    )
    b = job.prepare(lora).blueprint
    base = materialise(b, jax.random.key(0))
    held = base["embed_tokens"]["weight"].value
    np.testing.assert_array_equal(held, np.asarray(trained["embed_tokens"]["weight"]).astype(held.dtype))
    assert (run.train(lora) / "export" / "adapter_config.json").exists()


def test_a_run_without_a_checkpoint_is_no_model(tmp_path):
    (tmp_path / "config.yaml").write_text("model: demo\ndata: {train: demo}\n")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        job.model_folder(str(tmp_path))
