"""Which worker has which job: a row a job, with its owner, a fence that grows with each owner, and a heartbeat.

A job is anybody's whose lease is not live. Several workers take from one table: PostgreSQL passes by rows that another
holds (`SKIP LOCKED`), SQLite lets one transaction write at a time. Rows are locked in one order, the job's and then its
lease's, so that nobody waits in a circle.
"""

import time
from collections.abc import Collection
from typing import NamedTuple

from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session

from jaxtune.serve.store import states
from jaxtune.serve.store.tables import Job, Lease

EXPIRES_S = 30.0  # a lease whose heartbeat is older is nobody's
BEAT_S = 5.0  # between heartbeats


class Taken(NamedTuple):
    """A job that a worker has."""

    job_id: str
    owner: str
    fence: int


class Lost(Exception):
    """The job is another worker's by now; nothing more is to be written of it."""


def now(session: Session) -> float:
    """The time that leases go by: the database's, where it has a clock, as workers are on several machines."""
    if session.get_bind().dialect.name == "postgresql":
        return float(session.scalars(select(func.extract("epoch", func.clock_timestamp()))).one())
    return time.time()


def take(session: Session, owner: str, statuses: Collection[str], expires: float = EXPIRES_S) -> Taken | None:
    """The oldest job of these statuses that no live lease holds, from now on the owner's; None where there is none.

    Args:
      session: of `Database.write`.
      owner: a name that no other worker has, of the living and the dead.
      statuses: of which a job may be.
      expires: after how many seconds without a heartbeat a lease is nobody's.
    """
    dead = now(session) - expires
    free = or_(Lease.job_id.is_(None), Lease.heartbeat < dead)
    wanted = (
        select(Job.id)
        .outerjoin(Lease, Lease.job_id == Job.id)
        .where(Job.status.in_(statuses), free)
        .order_by(Job.seq)
        .limit(1)
        .with_for_update(of=Job, skip_locked=True)
    )
    if (job_id := session.scalar(wanted)) is None:
        return None
    # Between the look and the lock another may have taken it and let go of the row: the lease is read again.
    lease = session.scalar(select(Lease).where(Lease.job_id == job_id).with_for_update())
    if lease is None:
        lease = Lease(job_id=job_id, owner=owner, fence=0, heartbeat=0.0)
        session.add(lease)
    elif lease.heartbeat >= dead:
        return None
    lease.owner, lease.fence, lease.heartbeat = owner, lease.fence + 1, now(session)
    session.flush()
    return Taken(job_id, owner, lease.fence)


def heartbeat(session: Session, taken: Taken) -> None:
    """Say that the owner lives. Raises: Lost: it is the owner no longer."""
    if not _set(session, taken, now(session)):
        raise Lost(taken.job_id)


def release(session: Session, taken: Taken) -> None:
    """Let go of a job, if it is still the owner's; the row stays, so that fences only grow."""
    _set(session, taken, 0.0)


def fenced(session: Session, taken: Taken) -> Job:
    """The job, locked until the transaction ends: what every transaction of a worker begins with.

    Raises:
      Lost: the job is another's, or gone.
    """
    try:
        job = states.locked(session, taken.job_id)
    except LookupError as e:
        raise Lost(taken.job_id) from e
    lease = session.scalar(select(Lease).where(Lease.job_id == taken.job_id).with_for_update())
    if lease is None or (lease.owner, lease.fence) != (taken.owner, taken.fence):
        raise Lost(taken.job_id)
    return job


def _set(session: Session, taken: Taken, heartbeat: float) -> bool:
    mine = (Lease.job_id == taken.job_id, Lease.owner == taken.owner, Lease.fence == taken.fence)
    changed = session.execute(update(Lease).where(*mine).values(heartbeat=heartbeat).returning(Lease.job_id))
    return changed.first() is not None
