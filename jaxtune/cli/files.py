"""Verbs on what a service keeps: files and tuned models."""

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxtune import log
from jaxtune.cli.client import HERE, KeyFile, Url, talking
from jaxtune.cli.common import app, shown, table
from jaxtune.errors import UserError

if TYPE_CHECKING:
    from openai import OpenAI

files = typer.Typer(help="Files of a service: data to train on, results.", no_args_is_help=True)
models = typer.Typer(help="Models of a service: bases, and those that were tuned.", no_args_is_help=True)
app.add_typer(files, name="files")
app.add_typer(models, name="models")

FileId = Annotated[str, typer.Argument(metavar="ID", help="As `jaxtune files list` says.")]
ModelId = Annotated[str, typer.Argument(metavar="MODEL", help="As `jaxtune models list` says.")]
Out = Annotated[Path | None, typer.Option(help="The file to write; standard output where not given.")]
Yes = Annotated[bool, typer.Option("--yes", help="Ask nothing.")]
DEMO = "demo"
_WHOLE = 512 * 2**20  # larger files go in parts


def day(seconds: int | None) -> str:
    """A time as this machine's clock would have shown it."""
    return "" if not seconds else datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


def agreed(question: str, yes: bool) -> bool:
    """Whether the user says yes. Raises: UserError: nobody is there to ask."""
    if yes:
        return True
    try:
        return input(f"{question} [y/n]: ").strip().lower() in ("y", "yes")
    except EOFError as e:
        raise UserError("the input ended before an answer; give --yes") from e


def local(file: str) -> Path:
    """A file of this machine; `demo` is the sample that comes along. Raises: UserError: there is none."""
    path = Path(file)
    if not path.exists() and file == DEMO:
        import jaxtune

        return Path(jaxtune.__file__).parent / "demo" / "train.jsonl"
    if not path.is_file():
        raise UserError(f"{file}: no such file; give a JSONL file, or `demo` for the sample that comes along")
    return path


def put(client: "OpenAI", path: Path, purpose: Any) -> str:
    """Upload a file, in parts if it is large; gives its id."""
    if path.stat().st_size > _WHOLE:
        upload = client.uploads.upload_file_chunked(file=path, mime_type="application/jsonl", purpose=purpose)
        if upload.file is None:
            raise UserError(f"{path}: the upload ended without a file; try again")
        return upload.file.id
    with path.open("rb") as f:
        return client.files.create(file=f, purpose=purpose).id


def save(client: "OpenAI", file_id: str, out: Path | None) -> None:
    """Write what a file holds, bytes as they come."""
    with client.files.with_streaming_response.content(file_id) as response:
        if out is None:
            for piece in response.iter_bytes():
                sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.name}.tmp")
        try:
            with temporary.open("wb") as f:
                for piece in response.iter_bytes():
                    f.write(piece)
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)
    log.say(f"written to {out}")


@files.command("upload")
def files_upload(
    file: Annotated[str, typer.Argument(help="A file, or `demo` for the sample that comes along.")],
    purpose: Annotated[str, typer.Option(help="What for.")] = "fine-tune",
    base_url: Url = HERE,
    key_file: KeyFile = None,
) -> None:
    """Upload a file, and print its id."""
    path = local(file)
    with talking(base_url, key_file) as client:
        log.say(put(client, path, purpose))


@files.command("list")
def files_list(
    base_url: Url = HERE,
    key_file: KeyFile = None,
) -> None:
    """List the files, newest first."""
    with talking(base_url, key_file) as client:
        rows = [
            [f.id, log.size(f.bytes), day(f.created_at), f.purpose, f.status or "", f.filename]
            for f in client.files.list()
        ]
    table(["id", "size", "made", "purpose", "status", "name"], rows, "no files")


@files.command("get")
def files_get(file_id: FileId, out: Out = None, base_url: Url = HERE, key_file: KeyFile = None) -> None:
    """Print what a file holds, or write it to --out."""
    with talking(base_url, key_file) as client:
        save(client, file_id, out)


@files.command("delete")
def files_delete(file_id: FileId, base_url: Url = HERE, key_file: KeyFile = None) -> None:
    """Delete a file for good."""
    with talking(base_url, key_file) as client:
        client.files.delete(file_id)
    log.say(f"{shown(file_id)} is deleted")


@models.command("list")
def models_list(base_url: Url = HERE, key_file: KeyFile = None) -> None:
    """List the models that can be tuned or called."""
    with talking(base_url, key_file) as client:
        rows = [[m.id, m.owned_by or "", day(m.created)] for m in client.models.list()]
    table(["model", "of", "made"], rows, "no models")


@models.command("show")
def models_show(model: ModelId, base_url: Url = HERE, key_file: KeyFile = None) -> None:
    """Print what is known of a model."""
    with talking(base_url, key_file) as client:
        said = client.models.retrieve(model).to_dict()
    log.table([(k, shown(str(v))) for k, v in said.items() if v is not None])


@models.command("delete")
def models_delete(model: ModelId, yes: Yes = False, base_url: Url = HERE, key_file: KeyFile = None) -> None:
    """Delete a tuned model for good."""
    if not agreed(f"delete {model} for good?", yes):
        return log.say("kept")
    with talking(base_url, key_file) as client:
        client.models.delete(model)
    log.say(f"{shown(model)} is deleted")
