"""Tokens a second, first-step time and peak memory of one training step, beside a plain JAX step and transformers+peft.

    python -m tools.bench.step                      # LoRA r=8 on all linears, then full, then the last two layers
    python -m tools.bench.step --methods lora --rounds 9

A 25M-parameter LLaMA (vocabulary 32000, width 512, 6 layers, 8 heads, 4 kv heads, MLP 1376), 4 rows of 512 tokens,
float32, AdamW. Each contender lives in a process of its own; they take turns, so a noisy machine is noisy to all, and
the medians are compared.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.bench import flops
from tools.bench.contenders import BATCH, CONTENDERS, LENGTH, write_inputs
from tools.bench.turns import take_turns, work


def worker(name: str, folder: Path, method: str) -> None:
    """Take as many steps as are asked for; answer with seconds a step and peak MiB."""
    one = CONTENDERS[name](folder, method)

    def answer(line: str) -> str:
        began = time.perf_counter()
        for _ in range(int(line)):
            one()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return f"{(time.perf_counter() - began) / int(line)} {peak}"

    work(one, answer)


def race(folder: Path, method: str, names: list[str], rounds: int, steps: int) -> dict[str, tuple[float, float]]:
    """Median seconds a step, and peak MiB, of each contender, taking turns."""
    answers = take_turns("tools.bench.step", {n: [n, method, folder] for n in names}, rounds, str(steps))
    return {n: (statistics.median(float(t) for t, _ in a), float(a[-1][1])) for n, a in answers.items()}


def first_step(folder: Path, method: str, cache: Path) -> float:
    """Seconds from the start of `jaxtune train` to the end of its first step."""
    out = folder / f"first-{time.time_ns()}"
    keys = {
        "model": folder / "model", "data.train": folder / "texts.jsonl", "data.max_length": LENGTH, "output": out,
        "objective": "pretrain", "tuning.method": method, "train.batch_size": BATCH, "train.steps": 2,
        "train.compute_dtype": "float32", "train.remat": "none",
    }  # fmt: skip
    command = [sys.executable, "-m", "jaxtune", "train", *(f"{k}={v}" for k, v in keys.items())]
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True) as child:
        for line in child.stdout or ():
            if line.startswith("step 1/"):
                seconds = time.perf_counter() - began
                child.kill()
                return seconds
    raise SystemExit("no first step was seen")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--methods", nargs="+", default=["lora", "full", "freeze"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--skip-first-step", action="store_true")
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker[0], Path(args.worker[2]), args.worker[1])
    names = [n for n in CONTENDERS if n != "transformers+peft" or importlib.util.find_spec("peft")]
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("jax", "torch", "transformers", "peft") if
                importlib.util.find_spec(p)]  # fmt: skip
    print(f"Python {platform.python_version()}, {', '.join(versions)}; {os.cpu_count()} cores; {args.rounds} rounds")
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        write_inputs(folder)
        for method in args.methods:
            results = race(folder, method, names, args.rounds, args.steps)
            unit = results[names[-1]][0]
            print(f"\n{method}: {BATCH} × {LENGTH} tokens")
            for n, (seconds, peak) in results.items():
                rate = BATCH * LENGTH / seconds
                print(f"  {n:18} {rate:8.0f} tokens/s  {unit / seconds:5.2f} of {names[-1]}  peak {peak:6.0f} MiB")
            flops.report(folder, method)
            if not args.skip_first_step and method != "freeze":
                cache = folder / f"cache-{method}"
                cold = first_step(folder, method, cache)
                warm = statistics.median(first_step(folder, method, cache) for _ in range(3))
                print(f"  start to first step: {cold:.1f} s cold, {warm:.1f} s with a warm compile cache")


if __name__ == "__main__":
    main()
