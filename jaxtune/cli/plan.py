"""The verb plan."""

import json
import os
from typing import Annotated

import typer

from jaxtune import log
from jaxtune.cli.common import Pairs, app, one_of, read_config
from jaxtune.errors import UserError


@app.command()
def plan(
    arguments: Pairs = None,
    topology: Annotated[
        list[str] | None, typer.Option(help="v5e-8, v6e:2x4, v5p:4x4x4, cpu:8, gpu …; several make a table.")
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Try batch, remat, strategy, accumulation and base; print the fastest.")
    ] = False,
    price: Annotated[list[str] | None, typer.Option(help="Dollars for a chip and hour: v5e=1.20.")] = None,
    how: Annotated[str, typer.Option(help="full compiles the step; fast, a few layers of it; rule, nothing.")] = "full",
    tries: Annotated[int, typer.Option(min=1, help="Steps that a search compiles at most.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    cache: Annotated[bool, typer.Option(help="Take what an earlier plan said of the same step.")] = True,
) -> None:
    """Say what CONFIG takes on a machine that need not be here: memory, FLOPs, network, time. CONFIG's model may be the
    name of a preset, such as model=llama3.1-8b, and its data need not be there."""
    one_of("--how", how, ["full", "fast", "rule"])
    prices = _prices(price or [])
    names = topology or ["v5e-8"]
    c = read_config(arguments)
    _start(names, c.mesh.slices or 1)
    from jaxtune import planning
    from jaxtune.planning import topology as machines
    from jaxtune.planning.report import aligned, table

    if search:
        from jaxtune.planning.search import search as find

        for name in names:
            found = find(c, machines.parse(name, c.mesh.slices or 1), prices, tries, how, cache)  # type: ignore[arg-type]
            log.say(json.dumps(found.to_dict()) if as_json else found.text())
        return
    reports = planning.plan(c, names, how, prices, cache)  # type: ignore[arg-type]
    if as_json:
        log.say(json.dumps([r.to_dict() for r in reports], indent=2))
        return
    for r in reports:
        log.table(r.lines())
        log.say()
    if len(reports) > 1:
        for line in aligned(table(reports)):
            log.say(line)


def _prices(given: list[str]) -> dict[str, float]:
    try:
        return {name: float(value) for name, _, value in (x.partition("=") for x in given)}
    except ValueError as e:
        raise UserError(f"--price {' '.join(given)}: write a topology or chip and dollars, such as v5e=1.20") from e


def _start(names: list[str], slices: int) -> None:
    """Before JAX starts: only on this machine's CPU, with as many devices as machines without their compiler need."""
    from jaxtune.planning import topology

    wanted = [topology.parse(n, slices) for n in names]
    if any(t.platform == "gpu" for t in wanted):
        return
    import jax

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    jax.config.update("jax_platforms", "cpu")
    stood_in = [t.devices for t in wanted if t.platform == "cpu" or not topology.has_compiler()]
    if max(stood_in, default=0) > 1:
        jax.config.update("jax_num_cpu_devices", max(stood_in))
