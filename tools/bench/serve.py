"""What `jaxtune serve` bears on this machine: answers a second, calls while it trains, and that nothing is lost.

    python -m tools.bench.serve                    # two to four minutes on two cores
    python -m tools.bench.serve --tokens 128 --rounds 5

A service of its own on loopback, with its worker, and OpenAI's client. Answers come from a 14M-parameter LLaMA (width
384, 8 layers, random weights, float32). Sixteen of as many tokens (their end is forbidden by logit_bias) are asked for
one by one and all at once, in turns; the ratio is that of medians. Then 32 streams at once, each of which must end in
[DONE] and have all its tokens. Then a job trains the embedded model, and 200 wait: calls for it and for its events are
timed on one kept connection while it trains, and all jobs must be listed after.
"""

import argparse
import concurrent.futures
import contextlib
import http.client
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

END = 2  # of the embedded model's tokenizer
QUESTIONS = ("What does the heron eat?", "Where does the toad live?", "Who is the friend of the donkey?")


@contextlib.contextmanager
def serving(data: Path, models: Path) -> Iterator[str]:
    """A service; its base_url."""
    write_model(models / "wide")
    command = [sys.executable, "-m", "jaxtune", "serve", "--demo", "--port", "0"]
    command += ["--data", str(data), "--models", str(models)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout or ():
                if line.split()[:1] == ["base_url"]:
                    yield line.split()[1]
                    break
            else:
                raise SystemExit("the service did not start")
        finally:
            process.terminate()


def write_model(folder: Path) -> None:
    """The model that answers, with the embedded one's tokens."""
    from jaxtune.layers import Rope
    from jaxtune.models.decoder import DecoderConfig
    from tools.make_demo_model import DEMO, write_random_model

    c = DecoderConfig(
        vocab=512, embed=384, layers=8, heads=6, kv_heads=2, head=64, mlp=1024, ropes=(Rope(64, context=2048),),
        context=2048,
    )  # fmt: skip
    write_random_model(folder, c, seed=0)
    for f in ("tokenizer.json", "tokenizer_config.json"):
        (folder / f).write_bytes((DEMO / "model" / f).read_bytes())


def ask(client: Any, number: int, tokens: int, bias: dict[str, int]) -> int:
    """One streamed answer; the tokens that it has. Raises: RuntimeError: it was cut."""
    with client.chat.completions.with_streaming_response.create(
        model="wide", messages=[{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}], stream=True,
        max_tokens=tokens, temperature=1.0, seed=number, logit_bias=bias, stream_options={"include_usage": True},
    ) as response:  # fmt: skip
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    if lines[-1] != "[DONE]":
        raise RuntimeError(f"a stream ended in {lines[-1][:200]!r}")
    return json.loads(lines[-2])["usage"]["completion_tokens"]


def together(client: Any, count: int, tokens: int, bias: dict[str, int]) -> tuple[float, list[int]]:
    """Seconds for so many answers at once, and their tokens."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        began = time.perf_counter()
        made = list(pool.map(lambda n: ask(client, n, tokens, bias), range(count)))
        return time.perf_counter() - began, made


def one_by_one(client: Any, count: int, tokens: int, bias: dict[str, int]) -> tuple[float, list[int]]:
    """Seconds for so many answers, one after the other, and their tokens."""
    began = time.perf_counter()
    made = [ask(client, n, tokens, bias) for n in range(count)]
    return time.perf_counter() - began, made


def timed(base_url: str, path: str, calls: int) -> list[float]:
    """Milliseconds of each of so many calls on one connection, the fastest first."""
    address = urlsplit(base_url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port)
    took = []
    for _ in range(calls):
        began = time.perf_counter()
        connection.request("GET", f"{address.path}{path}")
        answer = connection.getresponse()
        answer.read()
        took.append((time.perf_counter() - began) * 1e3)
        if answer.status != 200:
            raise RuntimeError(f"{path}: answered {answer.status}")
    connection.close()
    return sorted(took)


def until(client: Any, job: str, status: str) -> None:
    """Wait for a job to be there."""
    while (now := client.fine_tuning.jobs.retrieve(job).status) != status:
        if now in ("failed", "succeeded", "cancelled"):
            raise RuntimeError(f"the job is {now}, not {status}")
        time.sleep(0.2)


def answers(client: Any, args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Rows on answers."""
    bias = {str(END): -100}
    for _ in range(3):  # compiles: which rows meet, and so which shapes, is another each time
        together(client, args.streams, args.tokens, bias)
    one_by_one(client, 1, args.tokens, bias)
    single, batched = [], []
    for _ in range(args.rounds):
        single.append(one_by_one(client, args.streams, args.tokens, bias)[0])
        batched.append(together(client, args.streams, args.tokens, bias)[0])
    count, a, b = args.streams * args.tokens, statistics.median(single), statistics.median(batched)
    yield f"{args.streams} answers of {args.tokens} tokens, one by one", f"{count / a:,.0f} tokens/s"
    yield f"the same at once (median of {args.rounds})", f"{count / b:,.0f} tokens/s, {a / b:.1f} ×"
    ratios = sorted(x / y for x, y in zip(single, batched, strict=True))
    yield "ratio, round by round", f"{ratios[0]:.1f} … {ratios[-1]:.1f}"
    took, made = together(client, 2 * args.streams, args.tokens, bias)
    whole = sum(n == args.tokens for n in made)
    yield f"{2 * args.streams} streams at once", f"{whole} whole, each with [DONE]; {sum(made) / took:,.0f} tokens/s"


def jobs(client: Any, base_url: str, data: Path, args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Rows on jobs."""
    with (data / "demo" / "train.jsonl").open("rb") as f:
        file = client.files.create(file=f, purpose="fine-tune").id
    first = client.fine_tuning.jobs.create(model="demo", training_file=file, hyperparameters={"n_epochs": 50}).id
    until(client, first, "running")
    began = time.perf_counter()
    made = {client.fine_tuning.jobs.create(model="demo", training_file=file, seed=n).id for n in range(args.jobs)}
    yield f"{args.jobs} jobs created, one trains", f"{(time.perf_counter() - began) / args.jobs * 1e3:.1f} ms each"
    while not any(e.type == "metrics" for e in client.fine_tuning.jobs.list_events(first, limit=20).data):
        time.sleep(0.5)
    for name, path in (("GET job", ""), ("list events", "/events?limit=20")):
        ms = timed(base_url, f"/fine_tuning/jobs/{first}{path}", args.calls)
        p50, p99 = ms[len(ms) // 2], ms[int(len(ms) * 0.99)]
        yield f"{name}, {args.calls} calls while it trains", f"p50 {p50:.1f} ms, p99 {p99:.1f} ms"
    if client.fine_tuning.jobs.retrieve(first).status != "running":
        raise RuntimeError("the job ended before all was timed; give fewer --calls")
    listed = [j.id for j in client.fine_tuning.jobs.list(limit=50)]
    lost = len((made | {first}) - set(listed)) + len(listed) - len(set(listed))
    yield "jobs listed", f"{len(listed)}, {lost} lost or twice"
    for job in [*made, first]:
        client.fine_tuning.jobs.cancel(job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--calls", type=int, default=500)
    args = parser.parse_args()
    import openai

    print(f"Python {platform.python_version()}; {os.cpu_count()} cores; jax {version('jax')};", end=" ")
    print(f"fastapi {version('fastapi')}; openai {version('openai')}; SQLite\n")
    print("| | |\n|---|---|", flush=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder, "data"), Path(folder, "models")) as url,
        openai.OpenAI(base_url=url, api_key="none", timeout=120) as client,
    ):
        for name, value in itertools.chain(answers(client, args), jobs(client, url, Path(folder, "data"), args)):
            print(f"| {name} | {value} |", flush=True)


if __name__ == "__main__":
    main()
