"""Which models are held, and how the process begins and ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest

from jaxtune.serve.inference.asks import Failure
from jaxtune.serve.inference.models import Models
from jaxtune.tuned import open_model
from tests.tiny import make_config, write_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("base") / "m")


@pytest.fixture(scope="module")
def tuned(base, sums_file, tmp_path_factory):
    """Two copies of an adapter."""
    from jaxtune.run import train

    folder = tmp_path_factory.mktemp("adapters")
    train(make_config(base, sums_file, folder / "r", train__steps=2))
    shutil.copytree(folder / "r" / "export", folder / "two")
    return folder / "r" / "export", folder / "two"


@pytest.fixture(scope="module")
def sizes(base, tuned):
    """Bytes of the base and of an adapter."""
    models = Models(2**30)
    one, two = models.acquire(str(base), None), models.acquire(str(base), str(tuned[0]))
    return one.size, two.size


def test_adapters_share_their_base(base, tuned, sizes):
    models = Models(2**30)
    held = [models.acquire(str(base), f and str(f)) for f in (None, *tuned)]
    assert models.acquire(str(base), None) is held[0]
    shared = {id(x) for x in jax.tree.leaves(held[0].tuned.weights)}
    for h in held[1:]:
        own = [x for x in jax.tree.leaves(h.tuned.weights) if id(x) not in shared]
        assert h.size == sum(x.nbytes for x in own) < sizes[0]
        assert shared <= {id(x) for x in jax.tree.leaves(h.tuned.weights)}
    want = open_model(str(tuned[0].parent)).generator.generate(["1 + 2 ="])[0]
    assert held[1].tuned.generator.generate(["1 + 2 ="])[0] == want


def test_the_least_used_goes_and_what_is_in_use_stays(base, tuned, sizes):
    whole, more = sizes
    models = Models(whole + more)
    first = models.acquire(str(base), str(tuned[0]))
    with pytest.raises(Failure, match="in use; try again later") as e:
        models.acquire(str(base), str(tuned[1]))
    assert e.value.status == 503
    models.release(first)
    second = models.acquire(str(base), str(tuned[1]))
    assert [k[1] for k in models.held] in ([None, str(tuned[1])], [str(tuned[1]), None])
    models.release(second)
    assert models.acquire(str(base), None) is models.held[str(base), None]
    assert len(models.held) == 2


def test_a_model_beyond_the_budget_is_refused(base, sizes):
    with pytest.raises(Failure, match="the model takes .*; its operator may raise cache_bytes") as e:
        Models(sizes[0] - 1).acquire(str(base), None)
    assert (e.value.status, e.value.code) == (400, "model_too_large")


def test_what_is_forgotten_goes_when_it_is_free(base, tuned):
    models = Models(2**30)
    one = models.acquire(str(base), str(tuned[0]))
    models.forget(str(tuned[0].parent))
    assert len(models.held) == 2
    models.release(one)
    assert [*models.held] == [(str(base), None)]


def test_a_damaged_model_tells_no_paths(base, tuned, tmp_path, capsys):
    broken = shutil.copytree(tuned[0], tmp_path / "a")
    (broken / "adapter_model.safetensors").write_bytes(b"no")
    models = Models(2**30)
    with pytest.raises(Failure) as e:
        models.acquire(str(base), str(broken))
    assert str(tmp_path) not in e.value.message
    assert str(tmp_path) in capsys.readouterr().err
    assert not models.held[str(base), None].uses


def process():
    return subprocess.Popen(
        [sys.executable, "-m", "jaxtune.serve.inference", str(2**30), str(os.getpid())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def test_the_process_counts_answers_and_ends_with_its_input(base):
    with process() as p:
        ask = {"base": str(base), "prompts": ["the fox", [5, 6, 7]], "max_tokens": 3}
        for id, op in ((1, "count"), (2, "generate")):
            p.stdin.write(json.dumps({"id": id, "op": op, **ask}).encode() + b"\n")
        p.stdin.flush()
        said = []
        while sum("done" in s for s in said) < 2:
            said.append(json.loads(p.stdout.readline()))
        assert said[0] == {"ready": True}
        counted = [s["tokens"] for s in said if "tokens" in s]
        assert counted[0] == counted[1]
        assert counted[0][1] == 3
        pieces = [x for s in said if s.get("id") == 2 for x in s.get("pieces", ())]
        assert {x["index"]: x["tokens"] for x in pieces if x["finish"]} == {0: 3, 1: 3}
        p.stdin.close()
        assert p.wait(30) == 0


def test_the_process_ends_with_who_started_it():
    """Even where that is killed."""
    script = (
        "import os, subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-m', 'jaxtune.serve.inference', '1', str(os.getpid())],"
        " stdin=subprocess.PIPE)\n"
        "print(p.pid, flush=True); time.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        while b"ready" not in parent.stdout.readline():
            pass
        os.kill(parent.pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        time.sleep(0.02)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
