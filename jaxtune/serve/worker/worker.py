"""Takes jobs from the table and makes models of them: one thread looks through files, one trains.

Every change of a job is one transaction that first sees that the job is still this worker's (`leases.fenced`), and
whose outcome can be told from the database and the job's folder alone. So a worker may be killed between any two
statements: whoever takes the job up again ends in the same place, and nothing is told twice.
"""

import contextlib
import os
import secrets
import socket
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Session

from jaxtune import log
from jaxtune.serve.settings import Settings
from jaxtune.serve.store import leases, states
from jaxtune.serve.store.database import Database
from jaxtune.serve.store.leases import Lost, Taken
from jaxtune.serve.store.storage import Storage
from jaxtune.serve.store.tables import Job
from jaxtune.serve.worker.child import TRAIN, Child

T = TypeVar("T")
AWAY = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.InternalError)  # the database, for a while


@dataclass(frozen=True)
class Pace:
    """How often a worker looks, in seconds, and how patient it is."""

    look: float = 0.5
    """Between looks at a job that trains, and for a job where there was none."""
    beat: float = leases.BEAT_S
    expires: float = leases.EXPIRES_S
    grace: float = 120.0
    """That a process has to save and leave; after that it is terminated, after twice that killed."""
    again: float = 2.0
    """Before a run that broke down is taken up again; doubled each time."""
    save: float = 600.0
    """Between saves that are asked for beside those of each epoch."""


@dataclass(eq=False)
class Held:
    """A job in this worker's hands."""

    taken: Taken
    seen: float = field(default_factory=time.monotonic)
    """When the last heartbeat came through."""
    lost: threading.Event = field(default_factory=threading.Event)
    child: Child | None = None

    def lose(self) -> None:
        """It is another's by now: what trains is ended at once, before two write in one folder."""
        self.lost.set()
        if self.child is not None:
            self.child.kill()


class Worker:
    """A worker; several share a database and a storage folder."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        storage: Storage,
        owner: str | None = None,
        pace: Pace = Pace(),
        command: Sequence[str] = TRAIN,
    ) -> None:
        """`command`: what trains; the config is its last argument."""
        self.settings, self.database, self.storage = settings, database, storage
        self.owner = owner or f"{socket.gethostname()[:64]}:{os.getpid()}:{secrets.token_hex(8)}"
        self.pace, self.command = pace, command
        self._held: set[Held] = set()
        self._guard = threading.Lock()

    def run(self, stop: threading.Event) -> None:
        """Work until told to stop; a job that trains is saved then, and goes back to the queue."""
        from jaxtune.serve.worker.running import train_one
        from jaxtune.serve.worker.validating import validate_one

        done = threading.Event()
        threads = [
            threading.Thread(target=self._again_and_again, args=(one, stop), name=one.__name__)
            for one in (validate_one, train_one)
        ]
        beats = threading.Thread(target=self._beat, args=(done,), name="heartbeats")
        for thread in (*threads, beats):
            thread.start()
        while any(t.is_alive() for t in threads):
            for held in self._all():
                # a database that is away may hang the heartbeats; what trains ends before another may take its job
                if time.monotonic() - held.seen > self.pace.expires - self.pace.look:
                    held.lose()
            threads[0].join(self.pace.look / 2)
            threads[1].join(self.pace.look / 2)
        done.set()
        beats.join()

    def _again_and_again(self, one: Callable[["Worker", threading.Event], bool], stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                worked = one(self, stop)
            except Lost as e:
                log.say(f"{e}: is another worker's by now")
                worked = True
            except AWAY as e:
                log.warn(f"the database does not answer ({type(e.orig).__name__}); it is asked again")
                worked = False
            except Exception:  # what nobody foresaw ends no thread, or the worker would look alive and do nothing
                traceback.print_exc()
                worked = False
            if not worked:
                stop.wait(self.pace.look)

    def _beat(self, done: threading.Event) -> None:
        while not done.wait(self.pace.beat):
            for held in self._all():
                began = time.monotonic()
                try:
                    with self.database.write() as session:
                        leases.heartbeat(session, held.taken)
                    held.seen = began
                except Lost:
                    held.lose()
                except sa.exc.SQLAlchemyError:
                    continue  # `run` sees how long it is

    def _all(self) -> list[Held]:
        with self._guard:
            return list(self._held)

    # --- what the two kinds of work share -----------------------------------------------------------------------------

    def take(self, statuses: Collection[str], begin: Callable[[Session, Job], None]) -> Taken | None:
        """A job of these statuses, with what begins it in the same transaction."""
        with self.database.write() as session:
            taken = leases.take(session, self.owner, statuses, self.pace.expires)
            if taken is not None:
                begin(session, states.locked(session, taken.job_id))
            return taken

    @contextlib.contextmanager
    def holding(self, taken: Taken) -> Iterator[Held]:
        """Heartbeats while this is open."""
        held = Held(taken)
        with self._guard:
            self._held.add(held)
        try:
            yield held
        finally:
            with self._guard:
                self._held.discard(held)

    def read(self, held: Held, look: Callable[[Session, Job], T]) -> T:
        """What a job is now; a database that is away is waited for. Raises: Lost: there is no such job any more."""
        return self._patiently(held, self.database.read, lambda s: look(s, _row(s, held.taken)))

    def write(self, held: Held, change: Callable[[Session, Job], T]) -> T:
        """A transaction over a job that is still this worker's; a database that is away is waited for.

        Raises:
          Lost: it is another's.
        """
        return self._patiently(held, self.database.write, lambda s: change(s, leases.fenced(s, held.taken)))

    def _patiently(
        self, held: Held, opened: Callable[[], contextlib.AbstractContextManager[Session]], work: Callable[[Session], T]
    ) -> T:
        while True:
            if held.lost.is_set():
                raise Lost(held.taken.job_id)
            try:
                with opened() as session:
                    return work(session)
            except AWAY as e:
                log.warn(f"the database does not answer ({type(e.orig).__name__}); it is asked again")
                held.lost.wait(self.pace.look)


def _row(session: Session, taken: Taken) -> Job:
    job = session.scalar(sa.select(Job).where(Job.id == taken.job_id))
    if job is None:
        raise Lost(taken.job_id)
    return job


def run(settings: Settings, stop: threading.Event) -> None:
    """Open the database and the storage of the settings, and work until told to stop.

    Raises:
      UserError: the database cannot be reached.
    """
    database = Database(settings.database_url)
    try:
        database.upgrade()
        Worker(settings, database, Storage(settings.data)).run(stop)
    finally:
        database.close()
