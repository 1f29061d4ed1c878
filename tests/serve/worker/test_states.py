"""Jobs under workers that are killed between any two transactions, and users who cancel, pause and resume."""

import contextlib
import itertools
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import select

from jaxtune.serve.checks.validation import inspect
from jaxtune.serve.store import leases, states
from jaxtune.serve.store.tables import Checkpoint, File, Model
from jaxtune.serve.worker import running, validating
from jaxtune.serve.worker.worker import Pace, Worker
from tests.serve.fake_train import EPOCH, STEPS, FakeChild
from tests.serve.places import Place, questions


class Killed(BaseException):
    """kill -9."""


class Fragile:
    """A database whose user is killed at the n-th boundary of a transaction: before it, before its commit, after it."""

    def __init__(self, database) -> None:
        self.database, self.left = database, None
        self.away: int | None = None  # the transaction whose commit is made, and its answer lost

    def boundary(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed

    @contextlib.contextmanager
    def write(self) -> Iterator:
        self.boundary()
        with self.database.write() as session:
            yield session
            self.boundary()
        self.boundary()
        if self.away is not None:
            self.away -= 1
            if self.away < 0:
                self.away = None
                raise sa.exc.OperationalError("commit", None, OSError("connection lost"))

    @contextlib.contextmanager
    def read(self) -> Iterator:
        with self.database.read() as session:
            yield session
        self.boundary()


_PLANS = [states.PAUSED, states.PAUSED, states.QUEUED, states.CANCELLED, "lease", "lease"]


class Machine(RuleBasedStateMachine):
    """Two workers and a user; the clock is the test's."""

    patch: pytest.MonkeyPatch
    report = None

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="jobs"))
        self.place = Place(self.root)
        self.file = self.place.add_file(questions(12))
        self.clock, self.never = 1000.0, threading.Event()
        self.patch.setattr(leases, "now", lambda session: self.clock)
        self.patch.setattr(validating, "inspect", lambda *a, **k: type(self).report)
        self.patch.setattr(running, "Child", FakeChild)
        FakeChild.between, FakeChild.breaks = staticmethod(self._between), set()
        self.plan: list[tuple[int, str]] = []
        self.workers = [self._worker(), self._worker()]
        self.jobs: dict[str, str] = {}
        self._create()

    def _worker(self) -> Worker:
        return Worker(self.place.settings, Fragile(self.place.database), self.place.storage, pace=Pace(look=0, again=0))

    def _between(self, step: int) -> None:
        """What users and the other worker do while a job trains."""
        for planned in [p for p in self.plan if p[0] == step]:
            self.plan.remove(planned)
            if planned[1] == "lease":
                self.clock += 31
                self._work(1, running.train_one)
            else:
                for job_id in self.jobs:
                    with contextlib.suppress(states.WrongState):
                        self.place.move(job_id, planned[1])

    def _work(self, which: int, one) -> bool:
        worker = self.workers[which]
        real = running.place

        def place(*given) -> None:
            worker.database.boundary()
            real(*given)
            worker.database.boundary()

        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(running, "place", place)
                patch.setattr(validating, "place", place)
                return one(worker, self.never)
        except (leases.Lost, sa.exc.OperationalError):
            return True
        except Killed:
            self.workers[which] = self._worker()
            return True

    def _create(self, kill: int | None = None) -> None:
        self.jobs[self.place.add_job(self.file)] = states.VALIDATING
        self._killed_at(0, kill, validating.validate_one)

    def _killed_at(self, which: int, kill: int | None, one) -> None:
        self.workers[which].database.left = kill
        self._work(which, one)
        self.workers[which].database.left = None

    @precondition(lambda self: len(self.jobs) < 4)
    @rule(kill=st.integers(0, 6))
    def create(self, kill: int) -> None:
        self._create(kill)

    @rule(which=st.integers(0, 1))
    def validate(self, which: int) -> None:
        self.clock += 31
        self._work(which, validating.validate_one)

    @rule(
        which=st.integers(0, 1),
        kill=st.none() | st.integers(0, 80),
        away=st.none() | st.integers(0, 20),
        plan=st.lists(st.tuples(st.integers(0, STEPS), st.sampled_from(_PLANS)), max_size=2),
        breaks=st.sets(st.integers(1, STEPS), max_size=2),
        later=st.sampled_from([0, 31, 31, 31]),
    )
    def train(self, which: int, kill: int | None, away: int | None, plan: list, breaks: set, later: int) -> None:
        self.clock += later
        self.workers[which].database.away = away
        self.plan, FakeChild.breaks = plan, breaks
        self._killed_at(which, kill, running.train_one)
        self.workers[which].database.away = None
        self.plan, FakeChild.breaks = [], set()

    @rule(data=st.data(), to=st.sampled_from([states.PAUSED, states.QUEUED, states.QUEUED, states.CANCELLED]))
    def ask(self, data, to: str) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        status = self.place.job(job_id).status
        if to == states.QUEUED and status != states.PAUSED:
            return  # a user can only resume
        with contextlib.suppress(states.WrongState):
            self.place.move(job_id, to)

    @invariant()
    def nothing_is_told_twice(self) -> None:
        for job_id, before in self.jobs.items():
            job, told = self.place.job(job_id), self.place.told(job_id)
            if before in states.FINAL:
                assert job.status == before
            self.jobs[job_id] = job.status
            once = Counter(m for m in told if m.startswith(("Step", "Check", "Valid", "Files", "New", "The job has")))
            assert not [m for m, n in once.items() if n > 1]
            assert not [m for m in told if "in the worker" in m or "internal" in m]  # an error that nobody foresaw
            steps = [e.data["step"] for e in self.place.events(job_id) if e.type == "metrics"]
            assert steps == list(range(len(steps)))
            if job.status == states.SUCCEEDED:
                self._is_whole(job, told)

    def _is_whole(self, job, told: list[str]) -> None:
        assert told[-1] == "The job has successfully completed"
        assert sum(m.startswith("Step") for m in told) == STEPS + 1
        with self.place.database.read() as session:
            rows = session.scalars(select(Model).where(Model.job_id == job.id)).all()
            kept = [c.step_number for c in session.scalars(select(Checkpoint).where(Checkpoint.job_id == job.id))]
            [file] = session.scalars(select(File).where(File.id.in_(job.result_files)))
        assert sorted(kept) == [EPOCH, 2 * EPOCH, STEPS]
        assert sorted(r.step or 0 for r in rows) == [0, *sorted(kept)]
        assert all(self.place.storage.model(r).is_dir() for r in rows)
        assert job.fine_tuned_model in [r.id for r in rows]
        assert len(self.place.storage.file(file.id).read_text().splitlines()) == STEPS + 1
        assert job.trained_tokens

    def teardown(self) -> None:
        try:
            for turn in itertools.count():
                self.clock += 31
                if not (self._work(0, validating.validate_one) | self._work(0, running.train_one)):
                    break
                assert turn < 50
            self.nothing_is_told_twice()
            assert all(s in states.FINAL or s == states.PAUSED for s in self.jobs.values()), self.jobs
        finally:
            self.place.database.close()
            shutil.rmtree(self.root)


def test_kills_lose_nothing_and_tell_nothing_twice(monkeypatch, tmp_path) -> None:
    place = Place(tmp_path)
    file = place.storage.file(place.add_file(questions(12)))
    Machine.patch = monkeypatch
    from jaxtune.serve.bases import found

    Machine.report = inspect(file, found(place.settings)["demo"], place.settings.limits, 64, "training_file")
    place.database.close()
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=14, stateful_step_count=8, deadline=None, suppress_health_check=list(HealthCheck),
            database=None, phases=[Phase.generate],
        ),
    )  # fmt: skip
