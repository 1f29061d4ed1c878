"""What a teacher is worth: a student of some of its layers, tuned with and without it, at equal steps.

    python -m tools.bench.distil MODEL --train T.jsonl --held V.jsonl --layers 0 --seeds 0 1 2 --steps 240

All runs see the same rows in the same order. What counts is the loss on held-out rows, of the data, in nats a token;
how far the student is from its teacher there, `kl`, is in the log of each run.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from jaxtune import config, convert, log, run
from jaxtune.blueprint import read_config

WAYS: dict[str, dict[str, Any] | None] = {  # of the section distill; None is without a teacher
    "data alone": None,
    "forward, weight 0.5": {"weight": 0.5},
    "forward, weight 0.9": {"weight": 0.9},
    "reverse, weight 0.5": {"weight": 0.5, "kind": "reverse"},
    "jsd, weight 0.9": {"weight": 0.9, "kind": "jsd"},
    "forward 0.5, features": {"weight": 0.5, "features": {"layers": None}},
    "features": {"weight": 0.0, "features": {"layers": None}},
}


def scores(a: argparse.Namespace, student: Path, way: str, seed: int, out: Path) -> tuple[float, float]:
    """Held-out loss before and after."""
    distill = WAYS[way]
    if distill is not None:
        distill = {"teacher": str(a.model.absolute()), "temperature": a.temperature, **distill}
        if "features" in distill:
            layers = read_config(a.model)["num_hidden_layers"]
            ends = [k - 1 for k in (*a.layers[1:], layers)]  # a layer stands for all up to the next one that was taken
            distill["features"] = {**distill["features"], "layers": list(enumerate(ends))}
    c = config.load(
        None,
        {"model": str(student), "output": str(out), "objective": "pretrain", "distill": distill},
        {"data": {"train": str(a.train), "validation": str(a.held), "max_length": a.length}},
        {"tuning": {"method": "full"}, "optim": {"learning_rate": a.rate}},
        {"train": {"steps": a.steps, "batch_size": a.batch, "compute_dtype": "float32", "remat": "none", "seed": seed}},
        {"evaluate": {"every": a.steps}, "checkpoint": {"every": a.steps, "keep": 1}},
    )
    run.train(c)
    held = [m for m in log.read_metrics(out / "metrics.jsonl") if "eval_loss" in m]
    return held[0]["eval_loss"], held[-1]["eval_loss"]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path, help="the teacher's folder")
    p.add_argument("--train", type=Path, required=True)
    p.add_argument("--held", type=Path, required=True)
    p.add_argument("--layers", type=int, nargs="+", required=True, help="of the teacher, for the student")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    p.add_argument("--steps", type=int, default=240)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--rate", type=float, default=1e-3)
    p.add_argument("--temperature", type=float, default=2.0)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        student = Path(tmp) / "student"
        convert.write_model(str(a.model), student, layers=a.layers)
        print("RESULT | way | seed | held-out loss before | after |")
        for seed in a.seeds:
            for way in a.ways:
                before, after = scores(a, student, way, seed, Path(tmp) / f"{way}-{seed}")
                print(f"RESULT | {way} | {seed} | {before:.4f} | {after:.4f} |", flush=True)


if __name__ == "__main__":
    main()
