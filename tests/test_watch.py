"""Processes end, and say why, when one of them is lost, hung or has failed; each with the code that says so."""

import os
import re
import signal
import time

import pytest

from tests.processes import ended, start, together

QUICK = {"JAXTUNE_LOST_AFTER": "5", "JAXTUNE_STEP_TIMEOUT": "6"}

# The watch alone, with steps that need nobody: what happens to a process is the same, and nothing is compiled.
WATCH = """
import os, signal, sys, time
import jax.numpy as jnp
from jaxtune import cli, distributed, watch
from jaxtune.errors import UserError
distributed.initialize()
what, i = sys.argv[1], distributed.members()[0]
def step(n):
    if i == 0 and what == "hung" and n == 3:
        never = distributed.store().blocking_key_value_get("never", 60000)
    if what == "compiling" and n == 2:
        distributed.store().key_value_set(f"begun/{i}", "")
        distributed.store().blocking_key_value_get(f"begun/{1 - i}", 60000)
    return None, {"loss": jnp.float32(n)}
def prepare(n):
    if what == "compiling" and i == 1 and n == 2:
        time.sleep(9)
def run():
    if i == 1 and what == "gone":
        os._exit(3)
    with watch.watching() as watched:
        if i == 1 and what == "config":
            raise UserError("no such config")
        step_ = watched(step, prepare)
        for n in range(60):
            if what == "compiling" and n == 4:
                return
            step_(n)
            print("step", n, flush=True)
            if i == (0 if what == "first" else 1) and n == 2:
                if what in ("SIGKILL", "SIGSTOP"):
                    os.kill(os.getpid(), getattr(signal, what))
                if what == "hung":
                    time.sleep(60)
                if what in ("failed", "first"):
                    raise UserError("no such file")
                if what == "odd":
                    raise KeyError("odd")
            time.sleep(1)
with cli.exit_codes():
    run()
"""


@pytest.mark.parametrize(
    ("what", "codes", "said"),
    [
        ("SIGKILL", (75, -9), "process 1 on .* is lost: no sign of life for"),
        ("SIGSTOP", (75, -9), "process 1 on .* is lost: no sign of life for"),
        ("hung", (75, 75), "a step is not done after .* s: process 1 on .* has not begun it"),
        ("failed", (75, 2), "process 1 on .* has failed: no such file"),
        ("odd", (75, 1), "process 1 on .* has failed: 'odd'"),
        ("first", (2, 75), "process 0 on .* has failed: no such file"),
        ("config", (75, 2), "process 1 on .* has failed: no such config"),
        ("gone", (75, 3), "process 1 on a host that never spoke is lost: no sign of life for"),
    ],
)
def test_the_others_end_in_bounded_time_and_say_why(what, codes, said):
    processes = start(WATCH, 2, 1, what, **QUICK)
    began = time.monotonic()
    other = what == "first"
    _, err = processes[other].communicate(timeout=120)
    took = time.monotonic() - began
    if what == "SIGSTOP":
        os.kill(processes[1].pid, signal.SIGKILL)
    rest = ended([processes[not other]])
    assert tuple(p.returncode for p in processes) == codes, err + rest[0].stderr
    assert re.search(f"stopped: {said}", err)
    assert took < 90


def test_compiling_is_not_hanging():
    assert all("step 3" in done.stdout for done in together(WATCH, 2, 1, "compiling", **QUICK))
