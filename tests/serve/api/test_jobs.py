"""Jobs through OpenAI's own client."""

import asyncio
import json
import threading

import openai
import pytest
import sqlalchemy as sa
from openai import Stream
from openai.types.fine_tuning import FineTuningJobEvent

from jaxtune.serve.store import ids, states
from jaxtune.serve.store.tables import Audit, Checkpoint, Event, Job, Model
from tests.serve.conftest import jsonl, make_service, serving


@pytest.fixture
def file_id(client):
    return client.files.create(file=("data.jsonl", jsonl()), purpose="fine-tune").id


@pytest.fixture
def create(client, file_id):
    def make(**given):
        return client.fine_tuning.jobs.create(**{"model": "demo", "training_file": file_id, **given})

    return make


def moved(service, job_id, *to):
    for state in to:
        with service.database.write() as session:
            states.move(session, job_id, state, f"now {state}")


def test_job_as_the_reference_has_it(client, create, file_id, service):
    job = create(
        suffix="My bot", seed=7, validation_file=file_id, metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": "auto"}}},
        hyperparameters={"n_epochs": 9}, extra_body={"jaxtune": {"rank": 4, "learning_rate": 0.01}},
    )  # fmt: skip
    assert job.id.startswith("ftjob-")
    asked = {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    told = json.loads(job.to_json())
    assert told.pop("created_at") > 0
    assert told.pop("id") == job.id
    assert told == {
        "object": "fine_tuning.job", "model": "demo", "status": "validating_files", "organization_id": "local",
        "training_file": file_id, "validation_file": file_id, "seed": 7, "user_provided_suffix": "My bot",
        "hyperparameters": asked, "method": {"type": "supervised", "supervised": {"hyperparameters": asked}},
        "metadata": {"team": "a"}, "integrations": [], "result_files": [], "error": None, "finished_at": None,
        "estimated_finish": None, "fine_tuned_model": None, "trained_tokens": None,
        "jaxtune": {"knobs": {"rank": 4, "learning_rate": 0.01}, "progress": {}, "started_at": None},
    }  # fmt: skip
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    [event] = client.fine_tuning.jobs.list_events(job.id).data
    assert event.message == f"Created fine-tuning job: {job.id}"
    assert (event.object, event.type, event.level) == ("fine_tuning.job.event", "message", "info")
    with service.database.read() as session:
        assert session.scalars(sa.select(Audit.action)).all() == ["file.create", "job.create"]


def test_older_hyperparameters_and_a_drawn_seed(create):
    job = create(hyperparameters={"n_epochs": 2})
    assert job.hyperparameters.n_epochs == 2
    assert 0 <= job.seed < 2**31


@pytest.mark.parametrize(
    ("given", "param", "code", "message"),
    [
        ({"model": "gpt-9"}, "model", "model_not_found", "does not exist"),
        ({"training_file": "file-unknown"}, "training_file", "invalid_file", "No such File object: file-unknown"),
        ({"validation_file": "file-unknown"}, "validation_file", "invalid_file", "No such File"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs", "invalid_value", "above 50"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", "invalid_value", "'auto' or a whole"),
        ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size", "invalid_value", "above 256"),
        ({"hyperparameters": {"epochs": 1}}, "hyperparameters.epochs", "unknown_parameter", "did you mean 'n_epochs'"),
        (
            {"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier",
            "invalid_value", "above 0",
        ),
        ({"suffix": "x" * 65}, "suffix", "invalid_value", "at most 64"),
        ({"suffix": "a\x00b"}, "suffix", "invalid_value", "NUL"),
        ({"seed": -1}, "seed", "invalid_value", "greater than or equal"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "invalid_value", "at most 512"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata", "invalid_value", "16"),
        ({"method": {"type": "dpo"}}, "method.type", "unsupported_value", "not supported yet"),
        ({"method": {"type": "reinforcement"}}, "method.type", "unsupported_value", "not supported yet"),
        ({"method": {"type": "magic"}}, "method.type", "invalid_value", "'supervised'"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", "unsupported_value", "not"),
        ({"extra_body": {"jaxtune": {"rnk": 1}}}, "jaxtune.rnk", "unknown_parameter", "did you mean 'rank'"),
        ({"extra_body": {"jaxtune": {"rank": 512}}}, "jaxtune.rank", "invalid_value", "256"),
        ({"extra_body": {"jaxtune": {"max_length": 9000}}}, "jaxtune.max_length", "invalid_value", "above 8192"),
        ({"extra_body": {"jaxtune": {"template": "chatlm"}}}, "jaxtune.template", "invalid_value", "chatml"),
        ({"extra_body": {"jaxtune": {"tuning": "full", "rank": 8}}}, "jaxtune", "invalid_value", "leave them out"),
        ({"extra_body": {"jaxtune": {"template": "../x"}}}, "jaxtune.template", "invalid_value", "pattern"),
        ({"extra_body": {"trust_remote_code": True}}, "trust_remote_code", "unknown_parameter", "Unknown parameter"),
    ],
)  # fmt: skip
def test_requests_that_are_refused(standing, given, param, code, message):
    file = next(iter(standing.files.list()), None) or standing.files.create(
        file=("data.jsonl", jsonl()), purpose="fine-tune"
    )
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as e:
        standing.fine_tuning.jobs.create(**{"model": "demo", "training_file": file.id, **given})
    assert (e.value.param, e.value.code) == (param, code)
    assert message in e.value.message
    assert e.value.type == "invalid_request_error"
    assert standing.fine_tuning.jobs.list().data == []


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"suffix": "\ud800"}, "suffix"),
        ({"model": "demo\udfff"}, "model"),
        ({"metadata": {"k": "\ud800"}}, "metadata.k"),
    ],
)
def test_halves_of_surrogate_pairs_are_refused(standing, given, param):
    body = json.dumps({"model": "demo", "training_file": "file-x", **given})  # escaped, as OpenAI's client cannot
    kind = {"Content-Type": "application/json"}
    answer = standing._client.post(f"{standing.base_url}fine_tuning/jobs", content=body, headers=kind)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert "Unicode" in answer.json()["error"]["message"]


def test_training_file_of_another_purpose(client, create):
    other = client.files.create(file=("x.txt", b"text"), purpose="user_data")
    with pytest.raises(openai.BadRequestError, match="upload it with purpose 'fine-tune'"):
        create(training_file=other.id)


def test_bases_that_are_too_large(tmp_path):
    service = make_service(tmp_path, limits={"model_bytes": 10})
    (tmp_path / "models" / "tiny" / "model.safetensors").write_bytes(b"x" * 11)
    with serving(service) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        file = client.files.create(file=("data.jsonl", jsonl()), purpose="fine-tune")
        with pytest.raises(openai.BadRequestError, match="models may have 10") as e:
            client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
        assert e.value.code == "model_too_large"
    service.database.close()


def test_same_request_twice_is_one_job(client, create, file_id):
    first = create(suffix="a")
    assert create(suffix="a").id == first.id
    assert create(suffix="b").id != first.id
    client.fine_tuning.jobs.cancel(first.id)
    assert create(suffix="a").id != first.id
    keyed = create(suffix="k", extra_headers={"Idempotency-Key": "one"})
    assert create(suffix="k", extra_headers={"Idempotency-Key": "one"}).id == keyed.id
    assert create(suffix="k", extra_headers={"Idempotency-Key": "two"}).id != keyed.id
    with pytest.raises(openai.BadRequestError) as e:
        create(suffix="other", extra_headers={"Idempotency-Key": "one"})
    assert e.value.code == "idempotency_key_reused"


def test_list_by_page_and_by_metadata(client, create, service):
    jobs = [create(seed=n, metadata={"n": str(n), "odd \"]' name": "x"}).id for n in range(4)]
    plain = create(seed=9).id
    listed = client.fine_tuning.jobs.list
    assert [j.id for j in listed(limit=2)] == [plain, *jobs[::-1]]
    assert [j.id for j in listed(metadata={"n": "2"})] == [jobs[2]]
    assert [j.id for j in listed(metadata={"n": "2", "odd \"]' name": "x"})] == [jobs[2]]
    assert listed(metadata={"n": "2", "m": "1"}).data == []
    assert [j.id for j in listed(extra_query={"metadata": "null"})] == [plain]
    with pytest.raises(openai.BadRequestError):
        listed(after="ftjob-unknown")
    with pytest.raises(openai.BadRequestError):
        listed(limit=0)


def test_cancel_pause_resume(client, create, service):
    jobs = client.fine_tuning.jobs
    job = create()
    with pytest.raises(openai.BadRequestError, match="validating_files; it cannot become paused") as e:
        jobs.pause(job.id)
    assert e.value.code == "invalid_job_state"
    moved(service, job.id, states.QUEUED)
    assert [jobs.pause(job.id).status for _ in range(2)] == ["paused"] * 2
    assert [jobs.resume(job.id).status for _ in range(2)] == ["queued"] * 2
    moved(service, job.id, states.RUNNING)
    cancelled = [jobs.cancel(job.id) for _ in range(2)]
    assert [c.status for c in cancelled] == ["cancelled"] * 2
    assert cancelled[0].finished_at
    with pytest.raises(openai.BadRequestError):
        jobs.resume(job.id)
    done = create(seed=2)
    moved(service, done.id, states.QUEUED, states.RUNNING, states.SUCCEEDED)
    with pytest.raises(openai.BadRequestError, match="is succeeded"):
        jobs.cancel(done.id)
    said = [e.message for e in jobs.list_events(job.id)][::-1][2:]
    assert said == ["The job has been paused", "The job has been resumed", "now running", "The job has been cancelled"]
    for call in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.list_events, jobs.checkpoints.list):
        with pytest.raises(openai.NotFoundError) as e:
            call("ftjob-unknown")
        assert (e.value.code, e.value.param) == ("fine_tune_not_found", "fine_tune_id")


def test_wrong_state_is_sent_once_and_a_full_queue_too(tmp_path):
    service = make_service(tmp_path, limits={"jobs": 1})
    seen = []
    with serving(service) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=2) as client:
        client._client.event_hooks["request"].append(lambda r: seen.append(r.url.path))
        file = client.files.create(file=("data.jsonl", jsonl()), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model="demo", training_file=file.id)
        seen.clear()
        with pytest.raises(openai.RateLimitError) as e:
            client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
        assert e.value.code == "queue_full"
        moved(service, job.id, states.FAILED)
        with pytest.raises(openai.BadRequestError):
            client.fine_tuning.jobs.cancel(job.id)
        assert len(seen) == 2
    service.database.close()


def test_failed_job_says_why(client, create, service):
    job = create()
    why = {"code": "invalid_n_examples", "message": "Training file has 3 example(s)", "param": "training_file"}
    with service.database.write() as session:
        states.move(session, job.id, states.FAILED, "no", "error", error=why, progress={"step": 3, "offset": 99})
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert (job.error.code, job.error.param) == ("invalid_n_examples", "training_file")
    assert job.jaxtune["progress"] == {"step": 3}


def test_events_newest_first_and_checkpoints(client, create, service):
    job = create()
    with service.database.write() as session:
        for n in range(1, 6):
            states.say(session, job.id, f"Step {n}/5: training loss=1.00", data={"step": n, "train_loss": 1.0})
            name = f"ft:demo:local::abcdefgh:ckpt-step-{n}"
            session.add(
                Checkpoint(
                    id=ids.new(ids.CHECKPOINT), created_at=1, job_id=job.id, step_number=n, model=name,
                    metrics={"step": n, "train_loss": 1.0},
                )
            )  # fmt: skip
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert [e.type for e in events] == ["metrics"] * 5 + ["message"]
    assert events[0].data == {"step": 5, "train_loss": 1.0}
    steps = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=2))
    assert [s.step_number for s in steps] == [5, 4, 3, 2, 1]
    assert steps[0].fine_tuned_model_checkpoint == "ft:demo:local::abcdefgh:ckpt-step-5"
    assert steps[0].metrics.train_loss == 1.0
    assert steps[0].fine_tuning_job_id == job.id


def follow(client, job_id, **headers):
    return client.get(
        f"/fine_tuning/jobs/{job_id}/events", cast_to=FineTuningJobEvent, stream=True,
        options={"params": {"stream": True}, "headers": headers}, stream_cls=Stream[FineTuningJobEvent],
    )  # fmt: skip


def test_events_as_they_come(client, create, service):
    job = create()
    seen = []
    for event in follow(client, job.id):
        seen.append(event.message)
        if len(seen) == 1:
            moved(service, job.id, states.QUEUED, states.CANCELLED)
    assert seen == [f"Created fine-tuning job: {job.id}", "now queued", "now cancelled"]
    first = client.fine_tuning.jobs.list_events(job.id).data[-1].id
    again = [e.message for e in follow(client, job.id, **{"Last-Event-ID": first})]
    assert again == seen[1:]
    with client._client.stream("GET", f"{client.base_url}fine_tuning/jobs/{job.id}/events?stream=true") as raw:
        assert raw.headers["content-type"].startswith("text/event-stream")
        assert raw.headers["x-accel-buffering"] == "no"
        assert "no-store" in raw.headers["cache-control"] or "no-cache" in raw.headers["cache-control"]
        lines = [line for line in raw.iter_lines() if line]
    assert lines[0] == f"id: {first}"
    assert lines[-1] == "data: [DONE]"
    with pytest.raises(openai.BadRequestError):
        follow(client, job.id, **{"Last-Event-ID": "ftevent-unknown"})
    with pytest.raises(openai.NotFoundError):
        follow(client, "ftjob-unknown")


def test_broken_stream_of_events_says_so(client, create, service):
    job = create()
    stream = follow(client, job.id)
    assert next(stream).message.startswith("Created")
    with service.database.write() as session:
        session.execute(sa.delete(Event))
    with pytest.raises(openai.APIError, match="Invalid 'after'"):
        next(stream)


def test_streams_are_bounded(tmp_path):
    service = make_service(tmp_path, limits={"key_streams": 1})
    with serving(service) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        file = client.files.create(file=("data.jsonl", jsonl()), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model="demo", training_file=file.id)
        stream = follow(client, job.id)
        next(stream)
        with pytest.raises(openai.RateLimitError):
            follow(client, job.id)
        client.fine_tuning.jobs.cancel(job.id)
        assert [e.message for e in stream] == ["The job has been cancelled"]
        assert len(list(follow(client, job.id))) == 2
    service.database.close()


def test_async_client(url, service):
    async def flow():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x") as client:
            file = await client.files.create(file=("data.jsonl", jsonl()), purpose="fine-tune")
            jobs = client.fine_tuning.jobs
            made = await asyncio.gather(*(jobs.create(model="demo", training_file=file.id, seed=n) for n in range(5)))
            listed = [j.id async for j in jobs.list(limit=2)]
            assert sorted(listed) == sorted(j.id for j in made)
            await asyncio.gather(*(jobs.cancel(j) for j in listed))
            assert (await client.files.delete(file.id)).deleted

    asyncio.run(flow())


def test_many_creates_of_one_request_at_a_time_make_one_job(client, file_id, service):
    made = []
    threads = [
        threading.Thread(
            target=lambda: made.append(client.fine_tuning.jobs.create(model="demo", training_file=file_id).id)
        )
        for _ in range(5)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(made) == 5
    assert len(set(made)) == 1
    with service.database.read() as session:
        assert session.scalar(sa.select(sa.func.count(Job.id))) == 1


def test_models(client, service, create):
    base = client.models.retrieve("meta-llama/Llama-3")
    assert (base.object, base.owned_by) == ("model", "system")
    job = create()
    name = "ft:demo:local:my-bot:abcdefgh"
    with service.database.write() as session:
        for step, n in ((None, name), (3, f"{name}:ckpt-step-3")):
            folder = service.storage.job(job.id) / "run" / (f"exports/step-{step}" if step else "export")
            folder.mkdir(parents=True)
            (folder / "adapter_config.json").write_text("{}")
            session.add(
                Model(
                    id=n, created_at=5, project="default", job_id=job.id, base="demo", kind="adapter", step=step,
                    folder=str(folder.relative_to(service.storage.root)),
                )
            )  # fmt: skip
        session.add(
            Checkpoint(id=ids.new(ids.CHECKPOINT), created_at=1, job_id=job.id, step_number=3, metrics={},
                       model=f"{name}:ckpt-step-3")
        )  # fmt: skip
    assert {m.id for m in client.models.list()} == {"demo", "tiny", "meta-llama/Llama-3", name, f"{name}:ckpt-step-3"}
    assert client.models.retrieve(name).owned_by == "local"
    further = create(model=name)
    with pytest.raises(openai.BadRequestError, match=f"tuned further by job {further.id}"):
        client.models.delete(name)
    client.fine_tuning.jobs.cancel(further.id)
    folder = service.storage.job(job.id) / "run" / "export"
    assert client.models.delete(name).deleted
    assert not folder.exists()
    assert service.engine.told[-1] == folder.resolve()
    assert client.models.retrieve(f"{name}:ckpt-step-3").id.endswith("step-3")
    client.models.delete(f"{name}:ckpt-step-3")
    assert client.fine_tuning.jobs.checkpoints.list(job.id).data == []
    for call in (client.models.retrieve, client.models.delete):
        with pytest.raises(openai.NotFoundError) as e:
            call(name)
        assert e.value.code == "model_not_found"
    with pytest.raises(openai.PermissionDeniedError, match="base model"):
        client.models.delete("meta-llama/Llama-3")
    assert client.fine_tuning.jobs.retrieve(job.id).id == job.id
