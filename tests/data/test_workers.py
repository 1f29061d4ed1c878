import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxtune.data import encode, workers
from jaxtune.data.encode import Settings
from jaxtune.data.examples import Conversation, Document, Message
from jaxtune.data.token_cache import Encoder
from jaxtune.errors import UserError
from jaxtune.hf import tokenizer


@pytest.fixture(scope="module")
def encoder(tiny):
    return Encoder(encode.encode, tokenizer.load(tiny), Settings(room=24))


def texts(n):
    return [Document("the fox eats berries " * (i % 7 + 1), f"d.jsonl:{i + 1}") for i in range(n)]


def test_processes_give_the_same_in_order_and_their_errors_arrive(encoder):
    examples = texts(900)
    bad = Conversation((Message("user", "?"),), "messages", "d.jsonl:7")
    template = Encoder(encode.encode, encoder.tokenizer, Settings("{{ messages[0].content }}"))
    with workers.Pool(encoder, 2) as pool:
        ours, theirs = [encoder(e) for e in examples], pool(examples)
        assert [e.outcome for e in ours] == [e.outcome for e in theirs]
        for a, b in zip(ours, theirs, strict=True):
            for x, y in zip(a.pieces, b.pieces, strict=True):
                np.testing.assert_array_equal(x.ids, y.ids)
                np.testing.assert_array_equal(x.mask, y.mask)
    with workers.Pool(template, 1) as pool, pytest.raises(UserError, match="^d.jsonl:7: has no assistant turn"):
        pool([bad])


def test_faults_and_killed_processes_are_told():
    fault = pytest.raises(RuntimeError, match="(?s)in a process that makes tokens.*TypeError")
    with workers.Pool(len, 1) as pool, fault:
        pool(["fox", None])
    with workers.Pool(len, 1) as pool:
        assert pool(["fox"]) == [3]
        [process] = pool._processes
        process.kill()
        process.wait()
        with pytest.raises(UserError, match=r"exit code -9\); if memory is short, take fewer, or data.workers=0"):
            pool(["fox"])


CALLER = """
import signal, time
from jaxtune.data import workers
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it otherwise
pool = workers.Pool(len, 1)
assert pool(["fox", "ox"]) == [3, 2]
print(pool._processes[0].pid, flush=True)
while True:
    time.sleep(0.01)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_the_caller_goes(tmp_path, how):
    code = tmp_path / "caller.py"  # not guarded by __name__: it is not run again in the processes
    code.write_text(CALLER)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    args = [sys.executable, str(code)]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env) as caller:
        pid = int(caller.stdout.readline())
        caller.send_signal(how)
    for _ in range(500):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    pytest.fail(f"process {pid} is still there")


def test_few_examples_are_not_worth_a_process(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert [workers.number(None, n) for n in (workers.WORTH - 1, workers.WORTH)] == [0, 8]
    assert workers.number(3, 1) == 3
