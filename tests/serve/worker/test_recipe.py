"""A job as a config: what auto becomes, what a job starts from."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxtune.config import Full, Lora, QLora
from jaxtune.errors import UserError
from jaxtune.serve import bases
from jaxtune.serve.settings import Limits
from jaxtune.serve.store.tables import Model
from jaxtune.serve.worker import recipe
from jaxtune.serve.worker.recipe import Start
from tests.serve.places import PROJECT, Place


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path)
    yield made
    made.database.close()


def _job(place: Place, **columns):
    h = recipe.resolved({"n_epochs": "auto", **columns.pop("hyperparameters", {})}, 450)
    job_id = place.add_job("file-" + "a" * 24, hyperparameters=h, **columns)
    return place.job(job_id)


def _made(place: Place, job):
    with place.database.read() as session:
        tuned = recipe.tuned_of(session, job)
    start = recipe.start_of(job, tuned, place.settings, place.storage)
    return start, recipe.make(job, start, place.settings, Path("/jobs/x"), Path("/jobs/x/t.jsonl"), None)


def test_auto_follows_rules_and_limits() -> None:
    assert [recipe.epochs(n) for n in (10, 25, 33, 34, 8333, 8334, 10**6)] == [10, 4, 3, 3, 3, 2, 1]
    assert [recipe.batch_size(n) for n in (1, 10, 64, 450, 4095, 4096, 10**6)] == [1, 1, 4, 8, 16, 32, 32]
    assert recipe.resolved({"n_epochs": 7, "batch_size": "auto"}, 100) == {
        "n_epochs": 7, "batch_size": 4, "learning_rate_multiplier": 1.0,
    }  # fmt: skip
    assert recipe.resolved({}, 10, Limits(epochs=2))["n_epochs"] == 2


def test_the_demo_model_is_tuned_as_the_rules_say(place) -> None:
    start, c = _made(place, _job(place, hyperparameters={"learning_rate_multiplier": 0.5}))
    assert start == Start("demo", bases.found(place.settings)["demo"].resolve(), None)
    assert c.optim.learning_rate == 0.0025
    assert isinstance(c.tuning, Lora)
    assert (c.tuning.rank, c.tuning.alpha, c.data.max_length, c.data.packing) == (16, 32, 256, False)
    assert (c.train.epochs, c.train.batch_size, c.train.seed, c.train.compute_dtype) == (3, 8, 1, "float32")
    assert (c.checkpoint.every, c.checkpoint.keep, c.checkpoint.export, c.evaluate.every) == (0, 3, True, 0)
    assert not c.data.cache


def test_knobs_hold(place) -> None:
    knobs = {"tuning": "full", "max_length": 64, "learning_rate": 1e-3, "packing": True, "dtype": "bfloat16",
             "template": "chatml"}  # fmt: skip
    _, c = _made(place, _job(place, knobs=knobs))
    assert isinstance(c.tuning, Full)
    assert (c.optim.learning_rate, c.data.max_length) == (1e-3, 64)
    assert (c.data.packing, c.train.compute_dtype, c.data.template) == (True, "bfloat16", "chatml")
    _, c = _made(place, _job(place, knobs={"tuning": "qlora", "rank": 4}))
    assert isinstance(c.tuning, QLora)
    assert c.tuning.alpha == 8
    with pytest.raises(UserError, match="template '/etc/x.jinja' is not known"):
        _made(place, _job(place, knobs={"template": "/etc/x.jinja"}))


def test_tuned_models_are_gone_on_from(place) -> None:
    demo = bases.found(place.settings)["demo"]
    adapter, whole = place.storage.root / "jobs" / "a", place.storage.root / "jobs" / "w"
    adapter.mkdir(parents=True)
    shutil.copyfile(demo / "tokenizer.json", adapter / "tokenizer.json")
    shutil.copytree(demo, whole)
    with place.database.write() as session:
        for kind in ("adapter", "whole"):
            row = Model(id=f"ft:demo:{kind}", created_at=0, project=PROJECT, job_id="j", base="demo", kind=kind,
                        folder=f"jobs/{kind[0]}")  # fmt: skip
            session.add(row)
    start, c = _made(place, _job(place, model="ft:demo:adapter"))
    assert (start.base, start.adapter, start.words) == ("demo", adapter, adapter)
    assert (c.model, c.tuning.adapter) == (str(demo.resolve()), str(adapter))
    start, c = _made(place, _job(place, model="ft:demo:whole"))
    assert (start.base, start.folder, start.words, c.tuning.adapter) == ("demo", whole, whole, None)
    with pytest.raises(UserError, match="tuning full: the model is an adapter"):
        _made(place, _job(place, model="ft:demo:adapter", knobs={"tuning": "full"}))
    other = _job(place, model="ft:demo:adapter")
    other.project = "another"
    with pytest.raises(UserError, match="is not there any more"):
        _made(place, other)


def test_a_base_beyond_the_limit_is_refused(place) -> None:
    place.settings = place.settings.model_copy(update={"limits": Limits(model_bytes=1000)})
    with pytest.raises(UserError, match="bytes of weights; the service takes 1000"):
        _made(place, _job(place))


def test_a_model_of_the_hub_is_measured_before_it_is_fetched(place, monkeypatch) -> None:
    fetched, demo = [], bases.found(place.settings)["demo"]

    def fetch(name: str, **given) -> str:
        fetched.append(given.get("revision"))
        return str(demo)

    files = [SimpleNamespace(rfilename="model.safetensors", size=2000), SimpleNamespace(rfilename="x.bin", size=10**9)]
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr("huggingface_hub.model_info", lambda *a, **k: SimpleNamespace(sha="abc", siblings=files))
    place.settings = place.settings.model_copy(update={"hub": True, "limits": Limits(model_bytes=1000)})
    with pytest.raises(UserError, match="model a/b: has 2000 bytes of weights; the service takes 1000"):
        _made(place, _job(place, model="a/b"))
    assert fetched == []
    place.settings = place.settings.model_copy(update={"limits": Limits()})
    assert _made(place, _job(place, model="a/b"))[0].folder == demo
    assert fetched == ["abc"]
    with pytest.raises(UserError, match="is not there any more"):
        _made(place, _job(place, model="../b"))


def test_sizes_come_from_the_heads_of_files(place, tmp_path) -> None:
    demo = bases.found(place.settings)["demo"]
    assert 700_000 < recipe.parameters(demo) < 1_000_000
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 77}}))
    assert recipe.context(tmp_path) == 77
    assert recipe.max_length({}, tmp_path, Limits()) == 77
    assert recipe.max_length({"max_length": 40}, tmp_path, Limits()) == 40
