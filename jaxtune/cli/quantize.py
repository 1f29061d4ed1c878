"""The verb quantize: a model in fewer bits."""

from pathlib import Path
from typing import Annotated

import typer

from jaxtune import log
from jaxtune.cli.common import Adapter, Target, app


@app.command()
def quantize(
    target: Target,
    out: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    method: Annotated[
        str, typer.Option(help="rtn: round to nearest; gptq and awq: calibrated; smoothquant: activations in int8 too.")
    ] = "rtn",
    dtype: Annotated[
        str | None,
        typer.Option(help="int4, int8 or fp8; of gguf f16, q8_0, q4_0 or q4_k. What suits the method where not given."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="gptq: as GPTQModel and vLLM read it; hf: compressed-tensors, for fp8 and smoothquant; gguf: for "
            "llama.cpp and Ollama."
        ),
    ] = None,
    group: Annotated[int, typer.Option(min=0, help="Of gptq: inputs that share a scale; 0: all of an output.")] = 128,
    data: Annotated[
        str | None, typer.Option(help="Rows to calibrate with, and, others of them, to measure with.")
    ] = None,
    held_data: Annotated[str | None, typer.Option(help="Rows to measure with.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many rows, of each.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Of a row, in tokens.")] = 2048,
    task: Annotated[str | None, typer.Option(help="A task whose score is measured too, see evaluate --task.")] = None,
    adapter: Adapter = None,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="Of gptq: codes reach from the least to the greatest number.")
    ] = False,
    act_order: Annotated[
        bool, typer.Option("--act-order", help="Of method gptq: begin with the inputs that matter most.")
    ] = False,
    strength: Annotated[
        float, typer.Option(min=0, max=1, help="Of smoothquant: how much the weights take over.")
    ] = 0.5,
    speed: Annotated[bool, typer.Option(help="Time decoding, before and after.")] = True,
) -> None:
    """Write a model in fewer bits, for jaxtune, vLLM, llama.cpp or Ollama, and say what it cost.

    The folder holds quantize.json: perplexity, a task's score, bytes and decoding speed, before and after. chat,
    evaluate and predict open folders of gptq and hf.
    """
    from jaxtune.compress import quantize as verb

    want = verb.wanted(method, dtype, format, group, not asymmetric, act_order, strength)
    report = verb.quantize(target, out, want, adapter, data, held_data, samples, length, task, speed)
    log.table(verb.table(report))
    log.say(f"written to {out}")
