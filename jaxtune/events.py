"""TensorBoard events, written where they are made.

The library's own SummaryWriter hands them to a thread, which dies of the first error of the disk and leaves the run
waiting at a full queue; here the error comes to whoever writes.
"""

import time
from collections.abc import Mapping
from pathlib import Path

_EVERY = 60.0  # seconds between flushes


class Events:
    """An events file."""

    def __init__(self, folder: Path, purge: int | None = None) -> None:
        """Args:
        folder: where it is made.
        purge: what earlier files hold from this step on does not count.

        Raises:
          OSError: it cannot be written.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._writer, self._flushed = EventsWriter(str(folder / "events")), 0.0
        if purge is not None:
            self._add(purge, session_log=SessionLog(status=SessionLog.START))

    def write(self, n: int, values: Mapping[str, float]) -> None:
        """Scalars by name at step `n`.

        Raises:
          OSError: they cannot be written.
        """
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._add(n, summary=scalar(name, value))
        if time.monotonic() > self._flushed + _EVERY:
            self._writer.flush()
            self._flushed = time.monotonic()

    def _add(self, n: int, **what: object) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=n, **what))

    def close(self) -> None:
        self._writer.close()
