"""Checkpoints as Hugging Face folders, and one a pass over the data."""

import pytest

from jaxtune import export, log
from jaxtune.errors import UserError
from jaxtune.run import train
from tests.tiny import make_config


def _made(tiny, sums_file, out, **dotted):
    given = {"train__steps": None, "train__epochs": 4, "train__batch_size": 10, "data__packing": False,
             "data__validation": 4, "checkpoint__every": 0, "evaluate__every": 0, "checkpoint__keep": 2,
             "checkpoint__export": True, **dotted}  # fmt: skip
    return make_config(tiny, sums_file, out, **given)


def test_each_pass_leaves_a_checkpoint_that_is_a_model(tiny, sums_file, tmp_path) -> None:
    out = train(_made(tiny, sums_file, tmp_path / "run"))
    entries = log.read_metrics(out / "metrics.jsonl")
    last = entries[-1]["total_steps"]
    passes = [last // 4 * k for k in (1, 2, 3, 4)]
    assert [m["step"] for m in entries if "eval_loss" in m] == [0, *passes]
    assert {int(f.name) for f in (out / "checkpoints").iterdir() if f.name.isdecimal()} == set(passes[-2:])
    assert {f.name for f in (out / "exports").iterdir()} == {f"step-{n}" for n in passes[-2:]}
    blobs = [(out / "exports" / f"step-{n}" / "adapter_model.safetensors").read_bytes() for n in passes[-2:]]
    assert blobs[0] != blobs[1] == (out / "export" / "adapter_model.safetensors").read_bytes()


def test_an_export_that_cannot_be_written_ends_no_run(tiny, sums_file, tmp_path, monkeypatch, capsys) -> None:
    def full(target, *given):
        if "step-" in target.name:
            raise UserError("No space left on device")
        return real(target, *given)

    real = export.write_export
    monkeypatch.setattr(export, "write_export", full)
    out = train(_made(tiny, sums_file, tmp_path / "run", train__epochs=2))
    assert (out / "export" / "adapter_model.safetensors").is_file()
    assert "is not exported (No space left on device); training goes on" in capsys.readouterr().err


def test_a_stream_has_no_passes(tiny, sums_file, tmp_path) -> None:
    streaming = {"data__streaming": True, "data__validation": 0.0, "train__steps": 2}
    with pytest.raises(UserError, match=r"evaluate.every=0 is a pass over the data, and data.streaming does not count"):
        train(_made(tiny, sums_file, tmp_path / "run", **streaming))
