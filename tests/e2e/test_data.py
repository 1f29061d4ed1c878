"""Runs over data that is streamed, or in buckets: stopped, they go on where they stood, bit by bit."""

import os
import signal

import pytest

from jaxtune import job, log, run
from jaxtune.errors import Interrupted, UserError
from tests.e2e.test_resume import losses, weights
from tests.tiny import make_config, write_jsonl

STREAM = {"data__streaming": True, "data__shuffle_buffer": 16, "data__workers": 0}
BUCKETS = {"data__packing": False, "data__max_length": 128, "data__validation": 4, "train__epochs": 2}


@pytest.fixture(scope="module")
def mixed_file(tmp_path_factory):
    """Short and long answers."""
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}" * (1 if i % 3 else 20)} for i in range(24)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "mixed.jsonl", rows)


@pytest.mark.parametrize("options", [STREAM | {"train__steps": 9}, BUCKETS | {"train__steps": None}])
def test_stopped_at_five_it_ends_as_if_it_had_not_been(tiny, mixed_file, tmp_path, monkeypatch, capsys, options):
    def config(name):
        return make_config(tiny, mixed_file, tmp_path / name, **options)

    straight = run.train(config("a"))
    told = capsys.readouterr().out
    step = log.RunLog.step

    def stopping(self, n, *rest):
        step(self, n, *rest)
        if n == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(log.RunLog, "step", stopping)
    with pytest.raises(Interrupted, match="saved"):
        run.train(config("b"))
    monkeypatch.undo()
    resumed = run.train(config("b"))
    assert losses(resumed) == losses(straight)
    assert weights(resumed) == weights(straight)
    made = job.prepare(config("c"))
    assert max(losses(straight)) == made.steps
    assert ("read as they are needed" in told) == ("data__streaming" in options)
    if "data__packing" in options:
        assert len(set(made.data.train.widths)) > 1
        assert made.steps == 2 * made.data.train.extent(4, 1, None, 0)[0]


def test_a_stream_is_refused_before_anything_is_trained(tiny, mixed_file, tmp_path):
    with pytest.raises(UserError, match="say how long to train with train.steps"):
        run.train(make_config(tiny, mixed_file, tmp_path / "r", **STREAM, train__steps=None))
    assert not (tmp_path / "r").exists()


def test_other_data_does_not_go_on_with_a_stream(tiny, mixed_file, tmp_path):
    run.train(make_config(tiny, mixed_file, tmp_path / "r", **STREAM))
    with pytest.raises(UserError, match="the run there differs in data_digest"):
        run.train(make_config(tiny, mixed_file, tmp_path / "r", **{**STREAM, "data__shuffle_buffer": 9}))
