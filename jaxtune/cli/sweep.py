"""The verbs sweep and lr-test."""

from pathlib import Path
from typing import Annotated

import typer

from jaxtune import log
from jaxtune.cli.common import Pairs, app, read_config


@app.command()
def sweep(
    arguments: Pairs = None,
    only_show: Annotated[
        bool, typer.Option("--show", help="Train nothing; tell and draw what was found so far.")
    ] = False,
    worker: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Try values of keys as the section `sweep` of CONFIG says, and write the best as a config. Run the same command
    again to go on after a stop. A sweep's folder stands for the config that it was begun with."""
    from jaxtune import search

    given = list(arguments or [])
    if given and (Path(given[0]) / search.SETTINGS).is_file():
        given[0] = str(Path(given[0]) / search.SETTINGS)
    c = read_config(given)
    if only_show:
        search.show(c)
    elif worker is not None:
        search.one_worker(c)
    else:
        search.sweep(c)


@app.command("lr-test")
def lr_test(
    arguments: Pairs = None,
    low: Annotated[float, typer.Option(help="The first learning rate.")] = 1e-7,
    high: Annotated[float, typer.Option(help="The last one.")] = 10.0,
    steps: Annotated[int, typer.Option(help="In how many steps it rises.")] = 100,
    out: Annotated[Path | None, typer.Option(help="Where lr.json and lr.png go; OUTPUT-lr where not given.")] = None,
) -> None:
    """Raise the learning rate of CONFIG step by step until the loss goes up, and suggest one (Smith, 2017). No run
    folder is touched."""
    from jaxtune.search.lr_range import range_test, write

    c = read_config(arguments)
    found = range_test(c, low, high, steps)
    folder = out or Path(f"{c.output}-lr")
    write(found, folder)
    if found.diverged is not None:
        log.say(f"the loss goes up at a learning rate of {found.diverged:.2g}")
    else:
        log.say(
            f"the loss does not go up until {found.points[-1][0] if found.points else low:.2g}; try a higher --high"
        )
    if found.steepest is not None:
        log.say(f"it falls fastest at {found.steepest:.2g}")
    if found.suggested is not None:
        log.say(f"suggested: optim.learning_rate={found.suggested:.1e}")
    log.say(f"written to {folder / 'lr.json'} and {folder / 'lr.png'}")
