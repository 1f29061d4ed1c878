"""What a run ran on is written down, once for each change, and names nobody."""

import json
from pathlib import Path

from jaxtune import cli, environment


def test_facts_name_versions_and_devices_and_nobody(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={Path.home()}/dump")
    found = environment.facts()
    assert found["versions"]["jax"]
    assert found["platform"] == "cpu"
    assert found["processes"] == 1
    assert found["flags"]["XLA_FLAGS"] == "--xla_dump_to=~/dump"
    assert str(Path.home()) not in json.dumps(found)


def test_it_is_recorded_once_for_each_change(tmp_path, monkeypatch):
    file = tmp_path / "environment.json"
    environment.record(file, seed=1, start=0)
    environment.record(file, seed=1, start=20)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--other")
    environment.record(file, seed=1, start=40)
    entries = json.loads(file.read_text())
    assert [(e["after_step"], e["seed"]) for e in entries] == [(0, 1), (40, 1)]
    assert entries[1]["flags"]["LIBTPU_INIT_ARGS"] == "--other"
    file.write_text("[{")
    environment.record(file, seed=1, start=60)
    assert len(json.loads(file.read_text())) == 1


def test_the_verb_prints_it(capsys):
    try:
        cli.main(["env"])
    except SystemExit as e:
        assert not e.code
    assert json.loads(capsys.readouterr().out)["versions"]["jaxtune"]
