"""What keeps a quiet stream alive is no event to OpenAI's client, though ids went before it."""

import time

import openai
from openai.types.fine_tuning import FineTuningJobEvent

from jaxtune.serve.api import following
from tests.serve.conftest import jsonl


def test_a_heartbeat_between_events_with_ids_is_no_event(client, monkeypatch):
    monkeypatch.setattr(following, "_PING_S", 0.02)
    file = client.files.create(file=("data.jsonl", jsonl()), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="demo", training_file=file).id
    told = []
    with client.get(
        f"/fine_tuning/jobs/{job}/events", cast_to=FineTuningJobEvent, options={"params": {"stream": True}},
        stream=True, stream_cls=openai.Stream[FineTuningJobEvent],
    ) as stream:  # fmt: skip
        for event in stream:
            told.append(event.message)
            if len(told) == 1:
                time.sleep(0.3)
                client.fine_tuning.jobs.cancel(job)
    assert len(told) == 2
    path = f"/fine_tuning/jobs/{job}/events?stream=true"
    whole = client.get(path, cast_to=str, options={"headers": {"Accept": "text/event-stream"}})
    assert whole.count("id: ") == 2
