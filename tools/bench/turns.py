"""Contenders, each in a process of its own, that take turns: a noisy machine is noisy to all."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def work(one: Callable[[], Any], answer: Callable[[str], str]) -> None:
    """A contender: warm up, then answer each line of standard input with one."""
    one(), one()
    print("ready", flush=True)
    for line in sys.stdin:
        print(answer(line), flush=True)


def take_turns(
    module: str, workers: Mapping[str, Sequence[object]], rounds: int, ask: str = "go"
) -> dict[str, list[list[str]]]:
    """What `python -m module --worker …` answers to `ask`, word by word, of each contender, round by round."""
    children: dict[str, Any] = {}
    for name, arguments in workers.items():
        command = [sys.executable, "-m", module, "--worker", *map(str, arguments)]
        children[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for name, child in children.items():
        while (line := child.stdout.readline()) and line.strip() != "ready":
            pass
        if not line:
            raise SystemExit(f"{name} ended before it was ready")
    answers: dict[str, list[list[str]]] = {name: [] for name in children}
    for _ in range(rounds):
        for name, child in children.items():
            time.sleep(0.3)  # let the others' thread pools go to sleep
            child.stdin.write(f"{ask}\n")
            child.stdin.flush()
            answers[name].append(child.stdout.readline().split())
    for child in children.values():
        child.stdin.close()
        child.wait()
    return answers
