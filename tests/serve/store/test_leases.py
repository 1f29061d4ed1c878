"""Who has which job: on SQLite and PostgreSQL alike."""

import threading
import time

import pytest
import sqlalchemy as sa

from jaxtune.errors import UserError
from jaxtune.serve.store import leases, states
from jaxtune.serve.store.database import Database
from jaxtune.serve.store.leases import Lost
from jaxtune.serve.store.tables import Base
from tests.serve.places import Place, questions
from tests.serve.postgres import postgres, postgres_server  # noqa: F401  (fixtures)


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request, tmp_path):
    url = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    made = Place(tmp_path, url)
    yield made
    made.database.close()


def _take(place: Place, owner: str, *statuses: str, expires: float = 30.0):
    with place.database.write() as session:
        return leases.take(session, owner, statuses or (states.VALIDATING,), expires)


def test_the_oldest_job_goes_to_one_worker_until_its_lease_is_dead(place) -> None:
    file = place.add_file(questions(10))
    first, second = place.add_job(file), place.add_job(file)
    a = _take(place, "a")
    assert a is not None
    assert a.job_id == first
    assert _take(place, "b").job_id == second
    assert _take(place, "c") is None
    assert _take(place, "a", states.QUEUED) is None
    time.sleep(0.02)
    again = _take(place, "c", expires=0.01)  # nobody has told that it lives
    assert (again.job_id, again.fence) == (first, a.fence + 1)
    with place.database.write() as session, pytest.raises(Lost):
        leases.heartbeat(session, a)
    with place.database.write() as session, pytest.raises(Lost):
        leases.fenced(session, a)
    with place.database.write() as session:
        leases.release(session, a)  # it is not a's to let go of
        assert leases.fenced(session, again).id == first
        leases.heartbeat(session, again)
    assert _take(place, "d") is None
    with place.database.write() as session:
        leases.release(session, again)
    freed = _take(place, "d")
    assert (freed.job_id, freed.fence) == (first, again.fence + 1)


def test_many_workers_take_each_job_once(place) -> None:
    file = place.add_file(questions(10))
    wanted = {place.add_job(file) for _ in range(12)}
    taken, guard = [], threading.Lock()

    def work(name: str) -> None:
        misses = 0
        while misses < 3:
            got = _take(place, name)
            misses = misses + 1 if got is None else 0
            if got is not None:
                with guard:
                    taken.append(got.job_id)

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(taken) == sorted(wanted)


def test_a_row_that_another_transaction_holds_is_passed_by(tmp_path, postgres) -> None:  # noqa: F811
    place = Place(tmp_path, postgres)
    file = place.add_file(questions(10))
    first, second = place.add_job(file), place.add_job(file)
    with place.database.write() as session:
        states.locked(session, first)
        assert _take(place, "b").job_id == second
    place.database.close()


def test_a_file_that_is_no_database_is_said_in_one_line(tmp_path) -> None:
    (tmp_path / "x.db").write_bytes(b"not a database at all, but a text that is longer than its header" * 20)
    with pytest.raises(UserError, match="x.db: cannot be used: file is not a database"):
        Database(f"sqlite:///{tmp_path / 'x.db'}").upgrade()


def test_the_tables_are_those_of_the_migrations(place) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with place.database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
        assert sa.inspect(connection).get_table_names()
