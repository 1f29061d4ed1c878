"""The same answers from PostgreSQL."""

import threading

import openai
import pytest
import sqlalchemy as sa

from jaxtune.serve.store.tables import File, Job
from tests.serve.api import test_files, test_jobs
from tests.serve.conftest import jsonl, make_key, make_service, serving, talking
from tests.serve.postgres import postgres, postgres_server  # noqa: F401


@pytest.fixture
def service(postgres, tmp_path):  # noqa: F811
    made = make_service(tmp_path, database=postgres, limits={"project_bytes": 20_000})
    yield made
    made.database.close()


def test_files_jobs_and_uploads(service, tmp_path):
    with serving(service) as url, talking(url) as client:
        file_id = client.files.create(file=("a.jsonl", jsonl()), purpose="fine-tune").id

        def create(**given):
            return client.fine_tuning.jobs.create(**{"model": "demo", "training_file": file_id, **given})

        test_jobs.test_list_by_page_and_by_metadata(client, create, service)
        test_jobs.test_cancel_pause_resume(client, create, service)
        test_jobs.test_events_as_they_come(client, create, service)
        test_jobs.test_models(client, service, create)
        test_files.test_uploads_in_parts(client, service, tmp_path)
        test_files.test_uploads_end(client, service)
        make_key(service)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_what_comes_at_the_same_time_is_counted_together(service):
    with serving(service) as url, talking(url) as client:
        file_id = client.files.create(file=("a.jsonl", jsonl()), purpose="fine-tune").id
        made, refused = [], []

        def create():
            made.append(client.fine_tuning.jobs.create(model="demo", training_file=file_id).id)

        def fill():
            try:
                client.files.create(file=("b", b"x" * 6000), purpose="user_data")
            except openai.APIStatusError as e:
                refused.append(e.code)

        threads = [threading.Thread(target=what) for what in (create,) * 4 + (fill,) * 5]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(made) == 4
        assert len(set(made)) == 1
        assert len(refused) == 2
        with service.database.read() as session:
            assert session.scalar(sa.select(sa.func.count(Job.id))) == 1
            assert session.scalar(sa.select(sa.func.sum(File.bytes))) == len(jsonl()) + 3 * 6000
