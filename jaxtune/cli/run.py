"""Verbs that take a config: train, validate, env, import-config, config-schema."""

import json
import math
from typing import Annotated

import typer

from jaxtune import config, log
from jaxtune.cli.common import Pairs, app, file_and_values, read_config
from jaxtune.errors import UserError


@app.command()
def train(arguments: Pairs = None) -> None:
    """Tune a model as CONFIG says, and export it. Run the same command again to go on after a stop."""
    import jax

    from jaxtune import distributed, run, watch

    distributed.initialize()  # before a translation asks for the number of devices
    with watch.watching():
        run.train(read_config(arguments, jax.device_count))


@app.command()
def validate(arguments: Pairs = None) -> None:
    """Check CONFIG, files, columns, lengths, memory and disk, before any device is touched."""
    import jax

    from jaxtune import overview

    c = read_config(arguments)
    if c.sweep is not None:
        from jaxtune.search.space import space

        space(c)
    jax.config.update("jax_platforms", "cpu")
    if (devices := math.prod(n for n in c.mesh.sizes.values() if n > 0)) > 1:
        jax.config.update("jax_num_cpu_devices", devices)  # the mesh is that of another machine
    log.table(overview.validate(c))
    log.say("valid")


@app.command()
def env() -> None:
    """Print versions, devices and compiler flags, for a bug report."""
    from jaxtune import environment, job

    job.use_compile_cache()
    log.say(json.dumps(environment.facts(), indent=1))


@app.command("import-config")
def import_config(
    arguments: Pairs = None,
    devices: Annotated[int | None, typer.Option(min=1, help="How many the run will be on; those here.")] = None,
) -> None:
    """Print a config of LLaMA-Factory as ours, with what has no meaning here as comments."""
    import jax

    file, given = file_and_values(arguments)
    t = config.translation(file, given, devices=jax.device_count if devices is None else lambda: devices)
    if t is None:
        raise UserError(f"{file or 'the given keys'}: not of LLaMA-Factory, whose configs have model_name_or_path")
    config.validate(t.tree, str(file or "config"))
    for note in [f"From {file or 'keys'} of LLaMA-Factory. Beside what is below:", *t.notes]:
        log.say(f"# {note}")
    log.say(config.dump_tree(t.tree).rstrip())


@app.command("config-schema")
def config_schema() -> None:
    """The JSON schema of a config, for editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **config.Config.model_json_schema()}
    log.say(json.dumps(schema, indent=2))
