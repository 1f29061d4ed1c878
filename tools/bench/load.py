"""Seconds and host memory to load a model, beside transformers' from_pretrained.

    python -m tools.bench.load                 # a 1 GB model in float32, also from a cache
    python -m tools.bench.load --gigabytes 2 --rounds 5

A LLaMA of the size asked (width 1024, MLP 2816, 16 heads, as many layers as it takes), random weights in safetensors
shards of 250 MB. Each contender runs in a fresh process, in turn. Time is that of the call alone: imports are done, the
page cache is warm. Memory is the highest resident set during the call, less what the process held before it; mapped
files count while they are mapped. It is given as a ratio to the bytes of the model.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_model(folder: Path, gigabytes: float) -> int:
    """The model that all read; returns its bytes."""
    from jaxtune.layers import Rope
    from jaxtune.models.decoder import DecoderConfig
    from tools.make_demo_model import write_random_model

    per_layer = 4 * (2 * 1024 * 1024 + 2 * 1024 * 512 + 3 * 1024 * 2816)
    layers = max(1, round((gigabytes * 1e9 - 4 * 2 * 16000 * 1024) / per_layer))
    c = DecoderConfig(16000, 1024, layers, 16, 8, 64, 2816, (Rope(64),))
    write_random_model(folder, c, seed=0, shard_bytes=250_000_000)
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def jaxtune(folder: Path) -> Callable[[], Any]:
    """Sharded arrays over the devices there are, as training reads them."""
    import jax

    from jaxtune import blueprint, config, sharding
    from jaxtune.tuning.method import FROZEN, Method, leave

    mesh = sharding.make_mesh(config.Mesh())

    def load() -> Any:
        b = blueprint.draw(folder, lambda _: Method(leave, [("", FROZEN)]), mesh, "float32")
        return jax.block_until_ready(jax.tree.leaves(blueprint.materialise(b, jax.random.key(0))))

    return load


def transformers(folder: Path) -> Callable[[], Any]:
    """`from_pretrained`, and every page of the result touched, as a first forward pass would."""
    import torch
    import transformers

    def load() -> Any:
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model, [p.sum() for p in model.parameters()]

    return load


CONTENDERS = {"jaxtune": jaxtune, "jaxtune, cache": jaxtune, "transformers": transformers}


def resident() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def worker(name: str, folder: Path) -> None:
    """Load once; print seconds and the highest resident set beyond that before."""
    load = CONTENDERS[name](folder)
    before, highest, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            highest[0] = max(highest[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    kept = load()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    print(seconds, max(highest[0], resident()) - before, len(kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker[0], Path(args.worker[1]))
    with tempfile.TemporaryDirectory() as tmp:
        size = write_model(Path(tmp) / "model", args.gigabytes)
        from jaxtune.convert import write_model as convert

        convert(str(Path(tmp) / "model"), Path(tmp) / "cache", to="orbax")
        print(f"Python {platform.python_version()}; {os.cpu_count()} cores; {size / 1e9:.2f} GB; {args.rounds} rounds")
        found: dict[str, list[tuple[float, float]]] = {n: [] for n in CONTENDERS}
        for _ in range(args.rounds):
            for name in CONTENDERS:
                folder = Path(tmp) / ("cache" if "cache" in name else "model")
                command = [sys.executable, "-m", "tools.bench.load", "--worker", name, str(folder)]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
                found[name].append((float(out[-3]), float(out[-2]) / size))
    base = statistics.median(t for t, _ in found["transformers"])
    for name, runs in found.items():
        seconds, memory = statistics.median(t for t, _ in runs), max(m for _, m in runs)
        print(f"  {name:<16} {seconds:6.2f} s  {seconds / base:5.2f} of transformers   memory {memory:.2f} × the model")


if __name__ == "__main__":
    main()
