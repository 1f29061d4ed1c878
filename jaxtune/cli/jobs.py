"""Verbs on the fine-tuning jobs of a service, ours or another that OpenAI's client can talk to."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxtune import config, log
from jaxtune.cli import following
from jaxtune.cli.client import HERE, KeyFile, Url, talking
from jaxtune.cli.common import app, shown, table
from jaxtune.cli.files import Out, Yes, agreed, day, local, put, save
from jaxtune.errors import UserError

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.fine_tuning import FineTuningJob

jobs = typer.Typer(help="Fine-tuning jobs of a service.", no_args_is_help=True)
app.add_typer(jobs, name="jobs")

JobId = Annotated[str, typer.Argument(metavar="ID", help="As `jaxtune jobs list` says.")]


@jobs.command("create")
def jobs_create(
    file: Annotated[str, typer.Argument(help="The id of a file, or a file, which is uploaded first; or `demo`.")],
    model: Annotated[str, typer.Option(help="The model to tune: a base, or one tuned before.")],
    knobs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="jaxtune's own: tuning=full, rank=16, max_length=1024, …"),
    ] = None,
    validation: Annotated[str | None, typer.Option(help="A file to measure on: an id, or a file.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Times that each example is seen.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples of a step.")] = None,
    learning_rate_multiplier: Annotated[
        float | None, typer.Option(min=0, help="Times the service's learning rate.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the tuned model's name.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of all that is drawn.")] = None,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Print the job's id, and leave.")] = False,
    yes: Yes = False,
    base_url: Url = HERE,
    key_file: KeyFile = None,
) -> None:
    """Create a job and follow it. What is not given is the service's to choose.

    Exit codes: 0 succeeded, 2 failed, 75 cancelled or paused.
    """
    own = config.parse_overrides(knobs or [])
    chosen = {"n_epochs": epochs, "batch_size": batch_size, "learning_rate_multiplier": learning_rate_multiplier}
    chosen = {k: v for k, v in chosen.items() if v is not None}
    with talking(base_url, key_file) as client:
        asked: dict[str, Any] = {"model": model, "training_file": _file_id(client, file, yes)}
        asked |= {"validation_file": _file_id(client, validation, yes)} if validation else {}
        asked |= {"hyperparameters": chosen} if chosen else {}
        asked |= {k: v for k, v in {"suffix": suffix, "seed": seed}.items() if v is not None}
        job = client.fine_tuning.jobs.create(**asked, extra_body={"jaxtune": own} if own else None)
        log.say(job.id)
    if not no_follow:
        following.follow(base_url, key_file, job.id)


def _file_id(client: "OpenAI", given: str, yes: bool) -> str:
    """The id of a file: as given, of an equal one that is there already, or of one that is uploaded now."""
    if given.startswith("file-") and not Path(given).exists():
        return given
    path = local(given)
    size = path.stat().st_size
    for there in client.files.list(purpose="fine-tune"):
        same = there.filename == path.name and there.bytes == size
        if same and agreed(f"{there.id} has the name and size of {path}; use it?", yes):
            return there.id
    file_id = put(client, path, "fine-tune")
    print(f"{path} is uploaded as {shown(file_id)}", file=sys.stderr)
    return file_id


@jobs.command("list")
def jobs_list(
    limit: Annotated[int, typer.Option(min=1, max=100, help="The newest so many.")] = 20,
    base_url: Url = HERE,
    key_file: KeyFile = None,
) -> None:
    """List jobs, newest first."""
    with talking(base_url, key_file) as client:
        rows = [
            [j.id, j.status, j.model, day(j.created_at), j.fine_tuned_model or ""]
            for j in client.fine_tuning.jobs.list(limit=limit).data
        ]
    table(["id", "status", "base", "made", "tuned model"], rows, "no jobs")


@jobs.command("show")
def jobs_show(job_id: JobId, base_url: Url = HERE, key_file: KeyFile = None) -> None:
    """Print what is known of a job."""
    with talking(base_url, key_file) as client:
        said = client.fine_tuning.jobs.retrieve(job_id).to_dict()
    for name in ("created_at", "finished_at", "estimated_finish"):
        said[name] = day(said.get(name))  # type: ignore[arg-type]
    log.table([(k, shown(str(v))) for k, v in said.items() if v not in (None, "", [], {})])


@jobs.command("follow")
def jobs_follow(job_id: JobId, base_url: Url = HERE, key_file: KeyFile = None) -> None:
    """Tell what becomes of a job until it ends; Ctrl-C leaves it running.

    Exit codes: 0 succeeded, 2 failed, 75 cancelled or paused.
    """
    following.follow(base_url, key_file, job_id)


@jobs.command("cancel")
def jobs_cancel(job_id: JobId, base_url: Url = HERE, key_file: KeyFile = None) -> None:
    """End a job; checkpoints made before stay."""
    with talking(base_url, key_file) as client:
        _say(client.fine_tuning.jobs.cancel(job_id))


@jobs.command("pause")
def jobs_pause(job_id: JobId, base_url: Url = HERE, key_file: KeyFile = None) -> None:
    """Save a job, and let it wait."""
    _move(job_id, "pause", base_url, key_file)


@jobs.command("resume")
def jobs_resume(job_id: JobId, base_url: Url = HERE, key_file: KeyFile = None) -> None:
    """Let a paused job go on."""
    _move(job_id, "resume", base_url, key_file)


def _move(job_id: str, verb: str, base_url: str, key_file: Path | None) -> None:
    from openai.types.fine_tuning import FineTuningJob

    with talking(base_url, key_file) as client:  # older clients have no method for it
        _say(client.post(f"/fine_tuning/jobs/{job_id}/{verb}", cast_to=FineTuningJob))


def _say(job: "FineTuningJob") -> None:
    log.say(f"{shown(job.id)} is {shown(job.status)}")


@jobs.command("events")
def jobs_events(job_id: JobId, base_url: Url = HERE, key_file: KeyFile = None) -> None:
    """Print what became of a job, oldest first."""
    with talking(base_url, key_file) as client:
        events = list(client.fine_tuning.jobs.list_events(job_id, limit=100))
    for event in reversed(events):
        log.say(f"{day(event.created_at)}  {shown(event.message)}")


@jobs.command("results")
def jobs_results(job_id: JobId, out: Out = None, base_url: Url = HERE, key_file: KeyFile = None) -> None:
    """Print the scores of a job's steps as CSV, or write them to --out."""
    with talking(base_url, key_file) as client:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if not job.result_files:
            raise UserError(f"job {job_id}: is {job.status} and has no results; they come when it has succeeded")
        save(client, job.result_files[0], out)


@jobs.command("checkpoints")
def jobs_checkpoints(job_id: JobId, base_url: Url = HERE, key_file: KeyFile = None) -> None:
    """List the checkpoints of a job, each of which can be called by its name."""
    with talking(base_url, key_file) as client:
        rows = [
            [
                str(c.step_number),
                c.fine_tuned_model_checkpoint,
                _number(c.metrics.train_loss),
                _number(c.metrics.valid_loss),
            ]
            for c in client.fine_tuning.jobs.checkpoints.list(job_id)
        ]
    table(["step", "model", "training loss", "validation loss"], rows, "no checkpoints")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
