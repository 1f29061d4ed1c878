"""The verb that prunes a model."""

from pathlib import Path
from typing import Annotated

import typer

from jaxtune import log
from jaxtune.cli.common import Adapter, Dtype, Target, app, dtype_of
from jaxtune.errors import UserError


@app.command()
def prune(
    target: Target,
    to: Annotated[Path, typer.Argument(metavar="DST", help="The folder that is written.")],
    method: Annotated[
        str,
        typer.Option(
            help="Zeros by magnitude, wanda or sparsegpt; or a smaller model without some heads, channels or layers."
        ),
    ] = "wanda",
    sparsity: Annotated[
        float | None, typer.Option(help="Share of zeros in the layers' matrices; of heads, channels or layers that go.")
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="n:m instead: 2:4 or 4:8, n of m inputs are kept.")] = None,
    scope: Annotated[
        str,
        typer.Option(help="Spread over matrices: uniform; global, by one threshold; outliers, by layer as OWL does."),
    ] = "uniform",
    budget: Annotated[
        list[str] | None, typer.Option(help="REGEX=SHARE for matrices such as layers/3/mlp/up_proj; several times.")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="A regex on matrices to leave alone; several times.")] = None,
    by: Annotated[str, typer.Option(help="Layers: by influence, or the run that is least angular.")] = "influence",
    refit: Annotated[bool, typer.Option(help="Heads, channels: let those that stay make up for the others.")] = True,
    data: Annotated[
        str | None, typer.Option(help="Rows to calibrate with, of any kind that can be trained on.")
    ] = None,
    validation: Annotated[str | None, typer.Option(help="Held-out rows, to measure perplexity with.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Rows to calibrate with.")] = 128,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a row, at most the model's context.")] = 2048,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the choice of rows.")] = 0,
    adapter: Adapter = None,
    dtype: Dtype = "float32",
    sweep: Annotated[
        str | None,
        typer.Option(
            help="Targets such as 0.1,0.3,0.5,2:4: write loss against them, not a model; --method may be several."
        ),
    ] = None,
) -> None:
    """Write a model with fewer weights: zeros in its matrices, or a smaller model of its family.

    Zeros stay through tuning with tuning.keep_zeros=true. DST holds prune.json: what went, and what it cost.
    """
    from jaxtune.compress import pruning

    a = pruning.Asked(
        method, sparsity, pattern, scope, _budgets(budget or []), skip or [], by, refit, data, validation, samples,
        length, batch_size, seed,
    )  # fmt: skip
    if sweep is not None:
        pruning.sweep(target, to, a, method.split(","), sweep.split(","), adapter)
        return log.say(f"written to {to / pruning.SWEEP}.png and .json")
    report = pruning.write(target, to, a, adapter, dtype_of(dtype))
    log.table(pruning.table(report))
    log.say(f"written to {to}")


def _budgets(given: list[str]) -> dict[str, float]:
    out = {}
    for x in given:
        pattern, _, share = x.rpartition("=")
        try:
            out[pattern] = float(share)
        except ValueError as e:
            raise UserError(f"--budget {x!r}: is not REGEX=SHARE; write it as in mlp=0.6") from e
    return out
