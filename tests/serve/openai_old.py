"""The flow of the oldest OpenAI client that still installs: `python openai_old.py BASE_URL FILE.jsonl [KEY]`.

Only what openai 1.0.0 has; it asserts, and prints one JSON object. No import of this package: it runs in an
environment of its own.
"""

import json
import sys
from pathlib import Path

import openai


def main(base_url: str, path: str, key: str = "any") -> None:
    client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)
    with Path(path).open("rb") as f:
        file = client.files.create(file=f, purpose="fine-tune")
    assert client.files.retrieve(file.id).filename == Path(path).name
    assert file.id in [f.id for f in client.files.list()]
    jobs = client.fine_tuning.jobs
    job = jobs.create(model="demo", training_file=file.id, suffix="old", hyperparameters={"n_epochs": 1})
    assert jobs.retrieve(job.id).status in ("validating_files", "queued", "running", "succeeded")
    assert job.id in [j.id for j in jobs.list(limit=1)]
    events = [e.message for e in jobs.list_events(job.id, limit=1)]
    assert events[-1] == f"Created fine-tuning job: {job.id}"
    try:
        jobs.create(model="no-such-model", training_file=file.id)
    except openai.NotFoundError as e:
        refused = str(e)
    assert jobs.cancel(job.id).status == "cancelled"
    assert "demo" in [m.id for m in client.models.list()]
    assert client.models.retrieve("demo").object == "model"
    assert client.files.delete(file.id).deleted
    print(json.dumps({"version": openai.__version__, "job": job.id, "refused": refused, "events": len(events)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
