"""A job followed to its end: a live line in a terminal, plain lines elsewhere. A broken connection is made again."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune import log
from jaxtune.cli.client import broken, talking
from jaxtune.cli.common import shown
from jaxtune.errors import Interrupted, UserError

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

ENDED = ("succeeded", "failed", "cancelled")
_POLL_S, _PAUSE_S = 2.0, 0.2  # between looks, between streams
_AGAIN_S, _TRIES = 2.0, 60  # after a broken connection
_WIDTH = 24  # of the bar


def follow(url: str, key_file: Path | None, job_id: str) -> None:
    """Tell a job's events until it ends or waits.

    Raises:
      UserError: it failed.
      Interrupted: it was cancelled or paused.
    """
    try:
        with talking(url, key_file) as client:
            job = _told(client, job_id, _Teller())
    except KeyboardInterrupt:
        at = f" --base-url {url}"
        log.say(f"\n{job_id} goes on. To follow it again: jaxtune jobs follow {job_id}{at}")
        log.say(f"To end it: jaxtune jobs cancel {job_id}{at}")
        return
    if job.status == "failed":
        why = job.error.message if job.error else None
        raise UserError(f"job {job_id} failed: {shown(why or 'no reason was given')}")
    if job.status != "succeeded":
        more = f"; go on with `jaxtune jobs resume {job_id}`" if job.status == "paused" else ""
        raise Interrupted(f"job {job_id} is {shown(job.status)}{more}")
    log.say(f"model: {shown(job.fine_tuned_model or '')}")


def _told(client: "OpenAI", job_id: str, teller: "_Teller") -> "FineTuningJob":
    """The job as it is when it has ended or waits, its events told."""
    lost = broken()
    tries = _TRIES  # what is not there at first will not come
    while True:
        try:
            job, tries = client.fine_tuning.jobs.retrieve(job_id), 0
            for event in _new_events(client, job_id, teller):
                if teller.tell(event):
                    job = client.fine_tuning.jobs.retrieve(job_id)
                    if job.status == "paused":
                        break
            if job.status in (*ENDED, "paused"):
                teller.end()
                return job
            time.sleep(_POLL_S if not teller.streams else _PAUSE_S)
        except lost:
            tries += 1
            if tries > _TRIES:
                raise
            if tries == 1:
                teller.line("the connection broke; it is made again")
            time.sleep(_AGAIN_S)


def _new_events(client: "OpenAI", job_id: str, teller: "_Teller") -> "Iterator[FineTuningJobEvent]":
    """Events not told yet, as they come where the service streams them; else those that there are after a while."""
    import openai
    from openai.types.fine_tuning import FineTuningJobEvent

    if teller.streams:
        options: Any = {"params": {"stream": True}, "headers": {"Last-Event-ID": teller.last} if teller.last else {}}
        try:
            with client.get(
                f"/fine_tuning/jobs/{job_id}/events", cast_to=FineTuningJobEvent, options=options, stream=True,
                stream_cls=openai.Stream[FineTuningJobEvent],
            ) as stream:  # fmt: skip
                teller.streams = stream.response.headers.get("content-type", "").startswith("text/event-stream")
                if teller.streams:
                    return (yield from stream)
        except openai.BadRequestError:  # of a service that knows no such parameter
            teller.streams = False
    new = []
    for event in client.fine_tuning.jobs.list_events(job_id, limit=100):
        if event.id in teller.told:
            break
        new.append(event)
    yield from reversed(new)


class _Teller:
    """Says events, each once; in a terminal those of steps move one live line."""

    def __init__(self) -> None:
        self.told: set[str] = set()
        self.last: str | None = None
        self.streams = True
        self._live = sys.stdout.isatty()
        self._open = False

    def tell(self, event: "FineTuningJobEvent") -> bool:
        """Say an event; whether it may have changed the job's state."""
        if event.id in self.told:
            return False
        self.told.add(event.id)
        self.last = event.id
        more = event.to_dict()  # older clients' events know of no data
        data, of_a_step = more.get("data"), more.get("type") == "metrics"
        if of_a_step and self._live and isinstance(data, dict) and data.get("total_steps"):
            sys.stdout.write(f"\r\x1b[K{bar(data)}")
            sys.stdout.flush()
            self._open = True
        else:
            clock = time.strftime("%H:%M:%S", time.localtime(event.created_at))
            self.line(f"{clock}  {shown(event.message)}")
        return not of_a_step

    def line(self, text: str) -> None:
        """A line of its own, after the live one."""
        self.end()
        log.say(text)

    def end(self) -> None:
        """Leave the live line as it is."""
        if self._open:
            log.say()
            self._open = False


def bar(data: dict[str, Any]) -> str:
    """How far a job is, as a line.

    >>> bar({"step": 30, "total_steps": 60, "train_loss": 1.25, "tokens_per_second": 2000.0})
    'step 30/60 ████████████············  loss 1.2500  2,000 tokens/s'
    """
    done = min(round(_WIDTH * data["step"] / data["total_steps"]), _WIDTH)
    parts = [f"step {data['step']}/{data['total_steps']} {'█' * done}{'·' * (_WIDTH - done)}"]
    if isinstance(loss := data.get("train_loss"), float):
        parts.append(f"loss {loss:.4f}")
    if isinstance(rate := data.get("tokens_per_second"), float):
        parts.append(f"{rate:,.0f} tokens/s")
    return "  ".join(parts)
