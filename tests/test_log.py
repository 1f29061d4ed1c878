"""The log: how fast, how much of the chip, and what stays when a run goes on."""

import json
import subprocess
import sys

import pytest

from jaxtune import chips, log, run
from jaxtune.log import RunLog
from jaxtune.planning.counting import flops_per_token
from tests.tiny import make_config


@pytest.fixture
def hands(monkeypatch):
    hands = {"now": 0.0}
    monkeypatch.setattr(log.time, "perf_counter", lambda: hands["now"])
    return hands


def test_speed_is_told_in_all_and_by_device_and_by_what_the_chips_can(tmp_path, hands, capsys):
    runlog = RunLog(tmp_path, 0, 3, devices=4, peak=1000.0)
    for n in (1, 2, 3):
        hands["now"] = 2.0 * n
        runlog.step(n, {"loss": 1.0}, tokens=80, write=True, flops=600.0, seconds={"steps": hands["now"]})
    runlog.close()
    for entry in log.read_metrics(tmp_path / "metrics.jsonl"):
        assert entry["tokens_per_second"] == 40
        assert entry["tokens_per_second_per_device"] == 10
        assert entry["mfu"] == 0.3
        assert entry["seconds"] == {"steps": 2.0 * entry["step"]}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1/3  loss 1.0000  40 tokens/s  30.0 % MFU  4 s left"
    assert lines[2] == "step 3/3  loss 1.0000  40 tokens/s  30.0 % MFU"


def test_a_chip_that_is_not_known_has_no_column(tmp_path, hands, capsys):
    runlog = RunLog(tmp_path, 0, 1)
    hands["now"] = 1.0
    runlog.step(1, {"loss": 1.0}, tokens=80, write=True)
    runlog.close()
    assert capsys.readouterr().out == "step 1/1  loss 1.0000  80 tokens/s\n"
    assert set(log.read_metrics(tmp_path / "metrics.jsonl")[0]) == {"step", "total_steps", "loss", "tokens_per_second"}


def test_lines_of_a_run_that_was_killed_are_dropped(tmp_path):
    lines = [{"step": n, "loss": 1.0} for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines) + '{"step": 4, "lo')
    assert [m["step"] for m in RunLog(tmp_path, 2, 9).history] == [1, 2]


def test_a_run_on_a_known_chip_tells_its_mfu_and_leaves_a_trace(tiny, sums_file, tmp_path, monkeypatch):
    chip = chips.CHIPS[0]._replace(kind="cpu$", flops={"bfloat16": 1e9})
    monkeypatch.setattr(chips, "CHIPS", (chip,))
    seen = []
    monkeypatch.setattr(run, "flops_per_token", lambda b, T: seen.append((T, flops_per_token(b, T))) or seen[-1][1])
    lora = {"method": "lora"}
    c = make_config(tiny, sums_file, tmp_path / "r", train__steps=2, tuning=lora, train__profile="2:9")
    out = run.train(c)
    assert list((out / "profile").rglob("*.xplane.pb"))
    (length, flops), *more = seen
    assert length == 32
    assert not more
    for m in log.read_metrics(out / "metrics.jsonl"):
        if "loss" in m:
            assert m["mfu"] == pytest.approx(m["tokens_per_second"] * flops / 1e9, rel=1e-3)


def test_a_reader_who_leaves_stops_nothing(tmp_path):
    script = (
        "import sys; from jaxtune import log\nfor i in range(20_000): log.say(str(i))\nopen(sys.argv[1], 'w').close()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "done")]
    talker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert talker.stdout is not None
    talker.stdout.readline()
    talker.stdout.close()
    _, errors = talker.communicate(timeout=60)
    assert (talker.returncode, errors) == (0, b"")
    assert (tmp_path / "done").exists()
