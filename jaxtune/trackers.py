"""Trackers that a run reports to beside its folder: Weights & Biases, Trackio, MLflow, where `track.to` names them.

They get the config and the lines of metrics.jsonl, and nothing else: no console, no code, no facts of the machine. A
thread of its own speaks with them, so that a slow network holds no step up; what they fail at is told once and never
ends the training. A run that goes on after a stop goes on there too, without a line twice.
"""

import contextlib
import importlib.util
import json
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from jaxtune import log
from jaxtune.config import Config, Track
from jaxtune.errors import Interrupted, UserError

FILE = "trackers.json"  # in the run folder: each tracker's run, and the last line that it has got
_PATIENCE_S = 120.0  # for the last lines to be sent
Status = Literal["finished", "stopped", "failed"]
Report = Callable[[int, Mapping[str, float]], None]


class About(NamedTuple):
    """What a tracker is told of a run at its start."""

    track: Track
    name: str
    folder: Path
    config: dict[str, Any]  # nested, without passwords
    id: str | None  # of the run there that this one goes on


class Tracker(Protocol):
    """A tracker: all that jaxtune asks of one."""

    def start(self, about: About) -> str:
        """Begin a run, or go on with that of `about.id`; returns the id to go on with."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """A line: scalars by name such as train/loss."""

    def finish(self, status: Status) -> None:
        """The run ends; what is on its way is sent."""


class Wandb:
    """https://docs.wandb.ai; its files lie in the run folder."""

    remedy = "sign in with `wandb login`, or set WANDB_MODE=offline and send it later with `wandb sync`"

    def start(self, about: About) -> str:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to its makers
        import wandb

        t, known = about.track, wandb.Settings.model_fields
        quiet = {"console": "off", "disable_code": True, "disable_git": True, "silent": True, "save_code": False}
        private = ("x_disable_meta", "x_disable_stats", "x_disable_machine_info")
        quiet |= dict.fromkeys(private, True) | {"x_save_requirements": False}
        self.run = wandb.init(
            project=t.project,
            name=about.name,
            group=t.group,
            tags=t.tags,
            config=about.config,
            dir=str(about.folder),
            id=about.id or uuid.uuid4().hex[:8],
            resume="allow",
            settings=wandb.Settings(**{k: v for k, v in quiet.items() if k in known}),
        )
        log.say(f"wandb: {self.run.url or f'not sent; `wandb sync {Path(self.run.dir).parent}` does so'}")
        return self.run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def finish(self, status: Status) -> None:
        self.run.finish(exit_code=int(status == "failed"))


class Trackio:
    """https://github.com/gradio-app/trackio; a run goes on by its name, which is made one of its own."""

    remedy = "look at TRACKIO_SPACE_ID or TRACKIO_SERVER_URL, and `hf auth login`"

    def start(self, about: About) -> str:
        import trackio

        name = about.id or f"{about.name}-{uuid.uuid4().hex[:6]}"
        off = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        config = {**about.config, "tags": about.track.tags}
        self.run = trackio.init(
            about.track.project, name=name, group=about.track.group, config=config, resume="allow", **off
        )
        return name

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def finish(self, status: Status) -> None:
        self.run.finish()


class Mlflow:
    """https://mlflow.org; config keys are its params."""

    remedy = "look at MLFLOW_TRACKING_URI, and that its server runs"

    def start(self, about: About) -> str:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        t, self.client = about.track, MlflowClient()
        if about.id is not None:
            self.id = about.id
            self.client.update_run(self.id, status="RUNNING")
            return self.id
        found = self.client.get_experiment_by_name(t.project)
        project = self.client.create_experiment(t.project) if found is None else found.experiment_id
        tags = {**dict.fromkeys(t.tags, "true"), **({"group": t.group} if t.group else {})}
        self.id = self.client.create_run(project, run_name=about.name, tags=tags).info.run_id
        params = [Param(k, str(v)[:500]) for k, v in _flat(about.config)]
        for i in range(0, len(params), 100):  # as many as it takes at a time
            self.client.log_batch(self.id, params=params[i : i + 100])
        return self.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[Metric(k, v, now, step) for k, v in values.items()])

    def finish(self, status: Status) -> None:
        ends = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        self.client.set_terminated(self.id, ends[status])


_KINDS: Mapping[str, Callable[[], Any]] = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


def check(t: Track) -> None:
    """Look for the packages of the trackers that are asked for.

    Raises:
      UserError: one is not installed; names the extra.
    """
    for name in t.to:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name, such as wandb makes, is no package
            raise UserError(f"track.to: {name} is not installed; pip install 'jaxtune[{name}]', or leave it out")


@contextlib.contextmanager
def reporting(c: Config, folder: Path, start: int) -> Iterator[Report]:
    """What takes the lines of a run to its trackers, until the end of the block. One process does it for all.

    Args:
      c: the run's config.
      folder: the run folder; its metrics.jsonl is still as the run was left.
      start: steps taken before.

    Raises:
      UserError: a tracker does not begin. Where the run goes on after a stop, that is a warning.
    """
    if log.hushed() or not c.track.to:
        yield lambda n, values: None
        return
    reporter = _Reporter(c, folder, start)
    status: Status = "failed"
    try:
        yield reporter.take
        status = "finished"
    except Interrupted:
        status = "stopped"
        raise
    finally:
        reporter.close(status)


class _Reporter:
    def __init__(self, c: Config, folder: Path, start: int) -> None:
        entries = log.read_metrics(folder / "metrics.jsonl")
        notes = _notes(folder / FILE)
        newest = max((m["step"] for m in entries), default=-1)
        names = [k for m in entries if m["step"] == newest for k in log.scalars(m)]
        config = json.loads(_masked(json.dumps(c.model_dump(mode="json"))))
        self._trackers: dict[str, Tracker] = {}
        self._failed: set[str] = set()
        self._seen: dict[str, tuple[int, list[str]]] = {}
        for name in c.track.to:
            note = notes.get(name, {})
            about = About(c.track, c.track.name or folder.resolve().name, folder, config, note.get("id"))
            tracker = _KINDS[name]()
            try:
                note["id"] = tracker.start(about)
            except Exception as e:  # whatever a package and its network come up with
                if not start:
                    self.close("failed")
                    raise UserError(f"track.to: {name} does not begin ({_reason(e)}); {tracker.remedy}") from e
                log.warn(f"{name}: does not go on ({_reason(e)}); training does, without it")
                continue
            self._trackers[name] = tracker
            if about.id is not None and newest >= note.get("step", -1):
                note |= {"step": newest, "names": names}
            self._seen[name] = note.get("step", -1), note.get("names", [])
            notes[name] = note
            if about.id is None:  # it is new to the run
                for m in (m for m in entries if m["step"] <= start):
                    self._try(name, tracker.log, m["step"], log.scalars(m))
        log.write_whole(folder / FILE, json.dumps(notes, indent=1) + "\n")
        self._lines: queue.SimpleQueue[tuple[int, dict[str, float]] | Status] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        self._thread.start()

    def take(self, n: int, values: Mapping[str, float]) -> None:
        """A line, to be sent when its turn comes."""
        self._lines.put((n, dict(values)))

    def _work(self) -> None:
        while not isinstance(line := self._lines.get(), str):
            n, values = line
            for name, (step, names) in self._seen.items():
                new = {k: v for k, v in values.items() if n > step or (n == step and k not in names)}
                if new:
                    self._try(name, self._trackers[name].log, n, new)
        for name, tracker in self._trackers.items():
            self._try(name, tracker.finish, line)

    def _try(self, name: str, what: Callable[..., None], *given: Any) -> None:
        try:
            what(*given)
        except Exception as e:  # as above
            if name not in self._failed:
                log.warn(f"{name}: a line is not sent ({_reason(e)}); metrics.jsonl has them all, training goes on")
            self._failed.add(name)

    def close(self, status: Status) -> None:
        """Send what is left, as long as that takes within reason."""
        if not hasattr(self, "_thread"):  # one of several did not begin
            for name, tracker in self._trackers.items():
                self._try(name, tracker.finish, status)
            return
        self._lines.put(status)
        self._thread.join(_PATIENCE_S)
        if self._thread.is_alive():
            log.warn(f"{', '.join(self._trackers)}: the last lines are not sent yet; metrics.jsonl has them all")


def _notes(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _masked(text: str) -> str:
    """Without the passwords of addresses.

    >>> _masked("postgresql://me:secret@host/db")
    'postgresql://…@host/db'
    """
    return re.sub(r"(\w+://)[^/@\s\"']+@", r"\1…@", text)


def _reason(e: Exception) -> str:
    text = f"{type(e).__name__}: {' '.join(str(e).split())}"[:200]
    for name in ("WANDB_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        if secret := os.environ.get(name):
            text = text.replace(secret, "…")
    return _masked(text)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
