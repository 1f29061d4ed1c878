"""What each way to tune costs and gives.

    python -m tools.bench.methods frozen                          # FLOPs and memory of a step by share of frozen layers
    python -m tools.bench.methods quality --model FOLDER --data FOLDER…   # every method on real data at equal steps

`frozen`: a 50M-parameter LLaMA with its untied head (the shape of `bench.step`, eight layers), 4 rows of 512 tokens,
float32, AdamW, no rematerialisation; the head trains in all of them, so that something does when all layers are frozen.

`quality`: the data folders hold train.jsonl and validation.jsonl with two text columns each (see `COLUMNS`). Rates are
tried on the first data set and the best of each method is kept. Seconds a step are medians of steps that the methods
take in turns, in one process.
"""

import argparse
import dataclasses
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.bench import contenders, flops

COLUMNS = {
    "sst2": {"prompt": "text", "completion": "label_text"},
    "dialogsum": {"prompt": "dialogue", "completion": "summary"},
    "multi30k_en_de": {"prompt": "en", "completion": "de"},
}
LENGTHS = {"sst2": 96, "dialogsum": 256, "multi30k_en_de": 128}
_SHARES = (0, 25, 50, 75, 100)
_RATES = {"full": (1e-3, 3e-3, 1e-2), "adapter": (1e-2, 3e-2, 1e-1)}

# name -> tuning section; those that train within a budget stand beside a uniform choice of the same budget
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "freeze: last layer": {"method": "freeze", "last": 1},
    "lora": {"method": "lora", "rank": 8},
    "lora, rank 12": {"method": "lora", "rank": 12},
    "dora": {"method": "lora", "rank": 8, "dora": True},
    "qlora nf4": {"method": "qlora", "rank": 8},
    "adalora 12 to 8": {"method": "adalora", "init_rank": 12, "rank": 8, "every": 5},
    "galore": {"method": "galore", "rank": 16, "every": 25, "scale": 1.0},
    "lisa: 1 layer": {"method": "lisa", "layers": 1, "every": 10},
    "lisa: 1 layer, importance": {"method": "lisa", "layers": 1, "every": 10, "draw": "importance"},
    "freeze: attention": {"method": "freeze", "train": [r"self_attn/._proj/weight"]},  # a quarter of stories656K
    "gradient_select 25 %": {"method": "gradient_select", "budget": 0.25, "every": 25},
}


def frozen() -> None:
    """The table of `frozen`."""
    from jaxtune import job as jobs
    from jaxtune import steps

    layers = 8
    sizes = {**contenders.SIZES, "num_hidden_layers": layers}
    contenders.SIZES.update(sizes)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        contenders.write_inputs(folder)
        print(" frozen      trained  GFLOP a step  state MiB  temporary MiB    peak")
        first = 0.0
        for share in _SHARES:
            last = layers - layers * share // 100
            tuning = {"method": "freeze", "last": last, "train": ["head", "^norm/"]}
            job = jobs.prepare(contenders.config(folder, "freeze", tuning=tuning))
            compiled = steps.compile_step(job)
            memory = compiled.memory_analysis()
            state, rest = (x / 2**20 for x in (memory.argument_size_in_bytes, memory.temp_size_in_bytes))
            first = first or state + rest
            print(
                f"{share:5} %  {trained(job):11,}  {flops.compiled(compiled.as_text()) / 1e9:12.1f}  {state:9.0f}  "
                f"{rest:13.0f}  {(state + rest) / first:6.2f}"
            )


def trained(job: Any) -> int:
    """Parameters that train."""
    from jaxtune.tuning.method import count

    return count(job.state.trainable)


@dataclasses.dataclass
class Row:
    """What a method gave on one data set."""

    name: str
    rate: float
    loss: float
    accuracy: float
    trained: int
    optimiser: int  # bytes
    gflop: float
    take: Callable[[], tuple[float, float]]  # one step: loss and seconds


def tune(name: str, tuning: dict, rate: float, model: Path, data: Path, out: Path, steps: int, seed: int) -> Row:
    """A whole run through the code that users run."""
    from jaxtune import config, log, overview, run
    from jaxtune import job as jobs
    from jaxtune.steps import compile_step

    given = {
        "model": model, "output": out, "tuning": tuning, "data.max_length": LENGTHS[data.name],
        "data.train": str(data / "train.jsonl"), "data.format": "prompt_completion", "data.columns": COLUMNS[data.name],
        "data.validation": 256, "train.steps": steps, "train.batch_size": 16, "train.compute_dtype": "float32",
        "train.remat": "none", "train.log_every": steps, "train.seed": seed, "optim.learning_rate": rate,
        "evaluate.every": steps, "checkpoint.every": steps, "checkpoint.keep": 1,
    }  # fmt: skip
    c = config.load(None, config.nested(given))
    run.train(c)
    held = [m for m in log.read_metrics(out / "metrics.jsonl") if "eval_loss" in m][-1]
    job = jobs.prepare(c)
    compiled = compile_step(job)
    gflop = flops.compiled(compiled.as_text()) / 1e9
    return Row(
        name, rate, held["eval_loss"], held["eval_accuracy"], trained(job), overview.held(job.state.optimiser), gflop,
        contenders.stepper(job, compiled),
    )  # fmt: skip


def quality(model: Path, folders: Sequence[Path], steps: int, rounds: int, only: Sequence[str], seeds: int) -> None:
    """The table of `quality`, one for each data set."""
    chosen: dict[str, float] = {}
    names = [n for n in METHODS if not only or any(n.startswith(o) for o in only)]
    with tempfile.TemporaryDirectory() as tmp:
        for data in folders:
            rows = []
            for name in names:
                rates = _RATES["adapter" if re.split(r"\W", name)[0] in _ADAPTERS else "full"]
                tries = [
                    [
                        tune(name, METHODS[name], r, model, data, Path(tmp) / f"{time.time_ns()}", steps, seed)
                        for seed in range(seeds)
                    ]
                    for r in ([chosen[name]] if name in chosen else rates)
                ]
                best = min(tries, key=lambda rows: statistics.fmean(r.loss for r in rows))
                chosen[name] = best[0].rate
                loss, accuracy = (statistics.fmean(getattr(r, k) for r in best) for k in ("loss", "accuracy"))
                rows.append(dataclasses.replace(best[0], loss=loss, accuracy=accuracy))
            for r in rows:
                r.take()
            turns = [[r.take()[1] for r in rows] for _ in range(rounds)]
            seconds = [statistics.median(times) for times in zip(*turns, strict=True)]
            report(data.name, rows, seconds, steps, seeds)


_ADAPTERS = ("lora", "dora", "qlora", "adalora")


def report(data: str, rows: Sequence[Row], seconds: Sequence[float], steps: int, seeds: int) -> None:
    print(f"\n{data}: {steps} steps of 16 rows of {LENGTHS[data]} tokens, mean of {seeds} seeds")
    columns = {"rate": 7, "val. loss": 9, "accuracy": 8, "trained": 9, "optimiser": 11, "GFLOP": 7, "time": 5}
    print(" ".join([" " * 26, *(f"{c:>{n}}" for c, n in columns.items())]))
    for r, s in zip(rows, seconds, strict=True):
        numbers = f"{r.rate:7.0e} {r.loss:9.4f} {r.accuracy:8.4f} {r.trained:9,} {r.optimiser:11,} {r.gflop:7.2f}"
        print(f"{r.name:26} {numbers} {s / seconds[0]:5.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("frozen")
    q = verbs.add_parser("quality")
    q.add_argument("--model", type=Path, required=True)
    q.add_argument("--data", type=Path, nargs="+", required=True)
    q.add_argument("--steps", type=int, default=150)
    q.add_argument("--rounds", type=int, default=5)
    q.add_argument("--seeds", type=int, default=1)
    q.add_argument("--only", nargs="*", default=[], help="methods whose names start so")
    args = parser.parse_args()
    if args.verb == "frozen":
        return frozen()
    quality(args.model, args.data, args.steps, args.rounds, args.only, args.seeds)


if __name__ == "__main__":
    main()
