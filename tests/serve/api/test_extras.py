"""Routes beyond OpenAI's that need no browser: what the page asks for."""

import io
import json
import re
import zipfile
from pathlib import Path

import openai
import pytest

from jaxtune.serve import bases
from jaxtune.serve.api.service import Service
from jaxtune.serve.checks import looking
from jaxtune.serve.store import keys
from jaxtune.serve.store.tables import Audit, Model
from tests.serve import seeded
from tests.serve.conftest import jsonl


def ask(client: openai.OpenAI, path: str, **query):
    return client.get(path, cast_to=dict, options={"params": query})


def name_of(service: Service, job_id: str, step: int | None = None) -> str:
    with service.database.read() as session:
        return next(m.id for m in session.query(Model) if m.job_id == job_id and m.step == step)


def test_about_tells_models_and_limits(service: Service, client: openai.OpenAI):
    job = seeded.add_job(service, "animals")
    about = ask(client, "/jaxtune/about")
    assert [b["id"] for b in about["bases"]] == ["demo", "meta-llama/Llama-3", "tiny"]
    assert about["bases"][0]["num_hidden_layers"] == 4
    assert [m["step"] for m in about["tuned"]] == [None, 120, 80, 40]
    assert {m["job"] for m in about["tuned"]} == {job}
    assert about["keys"] is False
    assert about["limits"]["epochs"] == 50


def test_metrics_go_on_where_they_were(service: Service, client: openai.OpenAI):
    job = seeded.add_job(service, "x", "running", 12)
    path = f"/jaxtune/jobs/{job}/metrics"
    page = ask(client, path)
    assert [row["step"] for row in page["data"]] == list(range(1, 13))
    assert page["data"][9]["valid_loss"] > 0
    assert ask(client, path, after=page["last_id"])["data"] == []
    with pytest.raises(openai.BadRequestError):
        ask(client, path, after="ftevent-nothing")
    told = ask(client, f"/jaxtune/jobs/{job}/messages", limit=2)
    assert [e["message"] for e in told["data"]] == [
        "Fine-tuning job started",
        "Files validated, moving job to queued state",
    ]
    assert told["has_more"] is True


def test_log_is_read_on_in_whole_lines_without_places(service: Service, client: openai.OpenAI):
    job = seeded.add_job(service, "x", "running", 1)
    log = service.storage.job(job) / "log.txt"
    log.write_text(f"reads {service.storage.root}/files/a\nhalf")
    page = ask(client, f"/jaxtune/jobs/{job}/log")
    assert str(service.storage.root) not in page["text"]
    assert page["text"].endswith("a\n")
    with log.open("a") as f:
        f.write(" a line\n")
    again = ask(client, f"/jaxtune/jobs/{job}/log", after=page["next"])
    assert again["text"] == "half a line\n"
    assert again["next"] == log.stat().st_size


def test_card_and_adapter_are_taken_away_and_noted(service: Service, client: openai.OpenAI):
    job = seeded.add_job(service, "x")
    name, run = name_of(service, job), service.storage.job(job) / "run"
    assert ask(client, f"/jaxtune/models/{name}/card")["text"].startswith("# A tuned model")
    (run / "export" / "README.md").unlink()
    base = bases.found(service.settings)["demo"].resolve()
    (run / "README.md").write_text(f"---\nbase_model: {base}\n---\n\n# run\n\njaxtune chat {run / 'export'}\n")
    (run / "export" / "adapter_config.json").write_text(f'{{"r": 4, "base_model_name_or_path": "{base}"}}')
    with client.with_options()._client.stream(
        "GET", f"{client.base_url}jaxtune/models/{name}/download?form=adapter"
    ) as answer:
        packed = zipfile.ZipFile(io.BytesIO(b"".join(answer.iter_bytes())))
    assert packed.testzip() is None
    files = {Path(n).name: packed.read(n).decode() for n in packed.namelist()}
    assert files.keys() == {"adapter_config.json", "README.md"}
    assert json.loads(files["adapter_config.json"]) == {"r": 4, "base_model_name_or_path": "demo"}
    assert files["README.md"].startswith(f"---\nbase_model: demo\n---\n\n# {name}\n")
    assert f"jaxtune chat {re.sub('[^A-Za-z0-9_-]+', '-', name)}\n" in files["README.md"]
    assert "/" not in files["README.md"]
    with service.database.read() as session:
        assert [(a.action, a.object_id) for a in session.query(Audit)] == [("model.download", name)]


def test_report_and_preview(service: Service, client: openai.OpenAI):
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes"}]} for n in range(12)
    ]
    file = seeded.add_file(service, "a.jsonl", jsonl(rows) + b'{"messages": []}\n')
    demo, limits = bases.found(service.settings)["demo"], service.settings.limits
    report = looking.report(service.storage.file(file), demo, limits, 256)  # as the program does that the API starts
    assert report["examples"] == 12
    assert report["errors"][0]["line"] == 13
    assert report["failure"]["code"] == "invalid_training_file"
    assert report["tokens"]["trained"] > 0
    preview = ask(client, f"/jaxtune/files/{file}/preview", model="demo", n=2)["data"]
    assert len(preview) == 2
    assert ["Yes" in text for text, trained in preview[0] if trained] == [True]
    assert not any("?" in text for text, trained in preview[0] if trained)
    client.files.delete(file)
    with pytest.raises(openai.NotFoundError):
        ask(client, f"/jaxtune/files/{file}/preview", model="demo", n=2)


def test_estimate_says_memory_and_refuses_what_does_not_fit(service: Service, client: openai.OpenAI):
    def estimate(**body):
        return client.post("/jaxtune/estimate", cast_to=dict, body={"model": "demo", **body})

    said = estimate(topology="v5e-1", jaxtune={"tuning": "full"})
    assert (said["fits"], said["topology"], said["settings"]["tuning"]) == (True, "v5e:1x1", "full")
    assert said["memory"]["frozen"] == 0 < said["memory"]["trained"] < said["memory"]["optimiser"]
    assert said["settings"]["max_length"] == 256
    assert "model" not in said["settings"]
    with pytest.raises(openai.BadRequestError, match="template"):
        estimate(jaxtune={"template": "nothing"})
    with pytest.raises(openai.BadRequestError):
        estimate(topology="cpu:64")
    with pytest.raises(openai.NotFoundError):
        estimate(model="../demo")


def test_other_projects_see_nothing(service: Service, client: openai.OpenAI):
    job = seeded.add_job(service, "x")
    name, file = name_of(service, job), seeded.add_file(service, "a.jsonl", jsonl())
    with service.database.write() as session:
        _, secret = keys.add(session, "other", "elsewhere", "user", None)
    other = client.with_options(api_key=secret)
    assert ask(other, "/jaxtune/about")["tuned"] == []
    for path in (
        f"/jaxtune/jobs/{job}/metrics", f"/jaxtune/jobs/{job}/messages", f"/jaxtune/jobs/{job}/log",
        f"/jaxtune/models/{name}/card",
        f"/jaxtune/models/{name}/download", f"/jaxtune/files/{file}/report?model=demo",
        f"/jaxtune/files/{file}/preview?model=demo",
    ):  # fmt: skip
        with pytest.raises(openai.NotFoundError):
            ask(other, path)
    with pytest.raises(openai.AuthenticationError):
        ask(client, "/jaxtune/about")


def test_damaged_base_is_told_without_a_place(service: Service, client: openai.OpenAI):
    file = seeded.add_file(service, "a.jsonl", jsonl())
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, f"/jaxtune/files/{file}/report", model="tiny")  # it has a config and nothing else
    assert str(service.storage.root.parent) not in json.dumps(caught.value.body)
