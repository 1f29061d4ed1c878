"""Tokens a second of greedy decoding, beside transformers' generate.

    python -m tools.bench.decode                 # 8 prompts of 64 tokens, 128 new tokens each
    python -m tools.bench.decode --kv-heads 6 --rounds 9

A 20M-parameter LLaMA (vocabulary 8192, width 384, 8 layers, 6 heads, 2 kv heads unless asked otherwise, MLP 1024),
random weights from one folder, float32, two torch threads, KV cache on, no end token. Each contender lives in a process
of its own and they take turns; both are warm (compilation and first calls are not counted), and a turn is a whole call:
prefill, decoding, tokens on the host (and, for jaxtune, their text and log-probabilities).
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.turns import take_turns, work

BATCH, PROMPT, NEW, VOCAB = 8, 64, 128, 8192


def write_model(folder: Path, kv_heads: int) -> None:
    """The model that both read."""
    from jaxtune.layers import Rope
    from jaxtune.models.decoder import DecoderConfig
    from tools.make_demo_model import DEMO, write_random_model

    c = DecoderConfig(
        vocab=VOCAB,
        embed=384,
        layers=8,
        heads=6,
        kv_heads=kv_heads,
        head=64,
        mlp=1024,
        ropes=(Rope(64, context=2048),),
        context=2048,
    )
    write_random_model(folder, c, seed=0)
    for f in ("tokenizer.json", "tokenizer_config.json"):
        (folder / f).write_bytes((DEMO / "model" / f).read_bytes())


def prompts() -> list[list[int]]:
    return np.random.default_rng(0).integers(3, VOCAB, (BATCH, PROMPT)).tolist()


def jaxtune(folder: Path) -> Callable[[], list[list[int]]]:
    """The public `Generator.generate`."""
    from jaxtune.generate import Generator, Sampling
    from jaxtune.tuned import open_model

    t = open_model(str(folder))
    generator = Generator(t.blueprint.model, t.weights, t.tokenizer, [])
    return lambda: [g.ids for g in generator.generate(prompts(), Sampling(NEW))]


def transformers(folder: Path) -> Callable[[], list[list[int]]]:
    """`generate`, greedy and with its cache."""
    import torch
    import transformers

    torch.set_num_threads(2)
    model: Any = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts())

    def one() -> list[list[int]]:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, use_cache=True,
            pad_token_id=0,
        )  # fmt: skip
        return out[:, PROMPT:].tolist()

    return one


CONTENDERS = {"jaxtune": jaxtune, "transformers": transformers}


def worker(name: str, folder: Path) -> None:
    """Generate whenever asked; answer with seconds and a sum of the tokens."""
    one = CONTENDERS[name](folder)

    def answer(_: str) -> str:
        began = time.perf_counter()
        tokens = one()
        return f"{time.perf_counter() - began} {sum(map(sum, tokens))}"

    work(one, answer)


def race(folder: Path, rounds: int) -> dict[str, float]:
    """Median seconds a call of each contender, taking turns; all must give the same tokens."""
    answers = take_turns("tools.bench.decode", {n: [n, folder] for n in CONTENDERS}, rounds)
    sums = {total for a in answers.values() for _, total in a}
    print(f"the tokens are {'the same' if len(sums) == 1 else 'NOT the same'}")
    return {n: statistics.median(float(t) for t, _ in a) for n, a in answers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker[0], Path(args.worker[1]))
    print(f"Python {platform.python_version()}; {os.cpu_count()} cores; {args.rounds} rounds; {args.kv_heads} kv heads")
    with tempfile.TemporaryDirectory() as tmp:
        write_model(Path(tmp) / "model", args.kv_heads)
        seconds = race(Path(tmp) / "model", args.rounds)
    for n, x in seconds.items():
        ratio = seconds["transformers"] / x
        print(
            f"  {n:14} {BATCH * NEW / x:7.0f} tokens/s  {x / NEW * 1e3:6.2f} ms a token  {ratio:5.2f} of transformers"
        )


if __name__ == "__main__":
    main()
