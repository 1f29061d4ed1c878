"""The verb explain."""

from pathlib import Path
from typing import Annotated

import typer

from jaxtune import log
from jaxtune.cli.common import Adapter, Dtype, Target, app, dtype_of


@app.command()
def explain(
    target: Target,
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For --file: format, columns.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option("--input", help="A text; may be given several times.")] = None,
    file: Annotated[str | None, typer.Option("--file", help="Rows, of any kind that can be trained on.")] = None,
    answer: Annotated[
        str | None, typer.Option("--target", help="A label, or words that go on; what the model says where not given.")
    ] = None,
    own: Annotated[bool, typer.Option("--answer", help="Explain the answer or the label that each row gives.")] = False,
    value: Annotated[str, typer.Option(help="What is explained of the answer: logprob or logit.")] = "logprob",
    baseline: Annotated[str, typer.Option(help="What stands for nothing: pad, the token, or zero embeddings.")] = "pad",
    parts: Annotated[
        str | None, typer.Option(help="Only some of attributions, inside, changes; commas between.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The model it was tuned from, where a run does not say so.")] = None,
    influence: Annotated[
        int, typer.Option(min=0, help="Name the n most helpful and most harmful training rows (of a run folder).")
    ] = 0,
    influence_rows: Annotated[int, typer.Option(min=1, help="Training rows that are looked at for that.")] = 1000,
    adapter: Adapter = None,
    dtype: Dtype = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that are read together.")] = 8,
    max_samples: Annotated[int, typer.Option(min=1, help="Only the first n rows.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longer texts are refused.")] = 256,
    out: Annotated[Path | None, typer.Option(help="Where explain.html and explain.json go; RUN/explain.")] = None,
) -> None:
    """Say what an answer comes from: which tokens, through which layers and heads, what tuning changed, and which
    training rows made it. One page, and JSON."""
    from jaxtune import explaining, job
    from jaxtune.explaining import Wish

    dtype_of(dtype)
    inputs = [*(text or []), *(_rows(target, file, keys or [], max_samples) if file else [])]
    wish = Wish(
        answer,
        own,
        value,
        baseline,
        parts.split(",") if parts else explaining.PARTS,
        base,
        influence,
        influence_rows,
        max_tokens,
        batch_size,
    )
    report = explaining.explain(target, inputs, wish, adapter, dtype)
    for remark in report["remarks"]:
        log.warn(remark)
    folder = out or (Path(target) if (Path(target) / job.CONFIG).exists() else Path()) / "explain"
    written = explaining.write(report, folder)
    log.say(f"written to {', '.join(str(f) for f in written)}")


def _rows(target: str, file: str, keys: list[str], most: int) -> list:
    """The first rows of a file, read as the model was trained on its own."""
    from jaxtune import tasks
    from jaxtune.cli import scores as measure
    from jaxtune.data import pipeline
    from jaxtune.data.heads import READS

    trained = measure.trained_as(target)
    objective = trained.objective if trained else None
    head = READS.get(objective or "")
    data = measure.data_like(trained, head, file, keys)
    data = data.model_copy(update={"train": [s.model_copy(update={"max_samples": most}) for s in data.sources]})
    remarks: list[str] = []
    examples = pipeline.examples(data, remarks, answers=False)
    for remark in remarks:
        log.say(remark)
    return examples if head else [tasks.asked(e, tasks.options_of(data)) for e in examples]
