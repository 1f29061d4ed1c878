"""Verbs on model folders: merge, convert, presets."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from jaxtune import log
from jaxtune.cli.common import app
from jaxtune.errors import UserError, nearest


@app.command()
def merge(
    target: Annotated[
        str, typer.Argument(help="A run folder, a PEFT adapter folder, or the base of the adapters that are given.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER[=WEIGHT]",
            help="A PEFT adapter folder, and what its change is multiplied by, 1 where not given; several add up.",
        ),
    ] = None,
    as_adapter: Annotated[
        bool, typer.Option("--as-adapter", help="Write one LoRA adapter, its rank the sum of theirs, instead.")
    ] = False,
) -> None:
    """Write a tuned model as one whole Hugging Face folder, adapters merged into the weights."""
    from jaxtune import convert
    from jaxtune.hf import several

    weights = several.weighted(adapter or [])
    if as_adapter:
        convert.write_adapter(target, out, weights)
    else:
        convert.write_model(target, out, weights)
    log.say(f"written to {out}")


@app.command("convert")
def convert_(
    source: Annotated[
        str,
        typer.Argument(help="A run, an export, a model folder or cache; llama2.c's .bin; a folder of Meta's .pth."),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    to: Annotated[str, typer.Option(help="hf: a Hugging Face folder; orbax: a cache to start from in seconds.")] = "hf",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; the source's own where not given.")
    ] = None,
    shard_size: Annotated[float, typer.Option(min=1e-6, help="The largest file, in GB (10⁹ bytes).")] = 5.0,
    layers: Annotated[
        str | None, typer.Option(help="Only these layers, from 0, such as 0,2,4: a student for its teacher.")
    ] = None,
) -> None:
    """Write a model in another form, dtype or size of files. After a kill the same command goes on."""
    from jaxtune import convert

    if layers is not None and not re.fullmatch(r"\d+(,\d+)*", layers):
        raise UserError(f"--layers {layers!r}: numbers with commas between were expected, such as 0,2,4")
    kept = None if layers is None else [int(i) for i in layers.split(",")]
    convert.write_model(source, out, None, dtype, to, int(shard_size * 1e9), kept)
    log.say(f"written to {out}")


@app.command()
def presets(name: Annotated[str | None, typer.Argument(help="A preset, whose config.json is printed.")] = None) -> None:
    """List the model sizes that are known by name, for planning without weights; or print one's config.json."""
    from jaxtune.models import families
    from jaxtune.models.presets import PARAMETERS, PRESETS

    if name is None:
        rows = [(n, families.from_hf(c, n)) for n, c in PRESETS.items()]
        return log.table(
            [(n, f"{PARAMETERS[n] / 1e9:7.2f}B  {d.family}, {d.layers} layers × {d.embed}") for n, d in rows]
        )
    if name not in PRESETS:
        raise UserError(f"preset {name!r} does not exist{nearest(name, list(PRESETS))}")
    log.say(json.dumps(PRESETS[name], indent=2))
