"""The verb push."""

from pathlib import Path
from typing import Annotated

import typer

from jaxtune import log
from jaxtune.cli.common import app


@app.command()
def push(
    target: Annotated[Path, typer.Argument(help="A run folder, whose export is sent, or a model folder.")],
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the Hugging Face hub.")],
    public: Annotated[bool, typer.Option("--public/--private", help="Whether everybody may see it.")] = False,
    base: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="The base on the hub, where the export names a folder.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch; the main one where not given.")] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be sent.")] = False,
) -> None:
    """Upload an export with its model card to the Hugging Face hub. After a failure the same command goes on."""
    from jaxtune import push_hub

    upload = push_hub.gather(target, name, base)
    sizes = upload.sizes
    log.table([(n, log.size(size)) for n, size in sizes.items()])
    seen = "everybody may see it" if public else "private"
    log.say(f"{len(sizes)} files, {log.size(sum(sizes.values()))}, to {name} ({seen})")
    if dry_run:
        return log.say("nothing is sent")
    log.say(f"sent: {push_hub.send(upload, public, revision, message)}")
