"""Verbs that take a config: train, validate, config-schema."""

import json
import math

from jaxtune import config, log
from jaxtune.cli.common import Pairs, app, read_config


@app.command()
def train(arguments: Pairs = None) -> None:
    """Tune a model as CONFIG says, and export it. Run the same command again to go on after a stop."""
    from jaxtune import run

    run.train(read_config(arguments))


@app.command()
def validate(arguments: Pairs = None) -> None:
    """Check CONFIG, files, columns, lengths, memory and disk, before any device is touched."""
    import jax

    from jaxtune import job

    c = read_config(arguments)
    jax.config.update("jax_platforms", "cpu")
    if (devices := math.prod(n for n in (c.mesh.data, c.mesh.fsdp, c.mesh.expert, c.mesh.tensor) if n > 0)) > 1:
        jax.config.update("jax_num_cpu_devices", devices)  # the mesh is that of another machine
    log.table(job.validate(c))
    log.say("valid")


@app.command("config-schema")
def config_schema() -> None:
    """The JSON schema of a config, for editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **config.Config.model_json_schema()}
    log.say(json.dumps(schema, indent=2))
