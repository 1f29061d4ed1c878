"""A campaign of faults against real runs of a tiny model, on this machine alone.

Runs are killed with SIGKILL at random moments, half of them while a checkpoint is being written; files of checkpoints
are changed, cut, swapped and deleted; the disk takes no more bytes. After each fault the same command is given again
until it is done, and the end is compared with that of a run that nobody disturbed: losses and weights, bit by bit.

    python -m tools.faults --kills 200 --corrupt 60 --full 20          # about 20 minutes on 2 cores
    python -m tools.faults --kills 20 --processes 2                    # runs of two processes, joined over loopback

Trials are forked from a process that has imported everything and touched no device, so a trial takes a second or two.
Which file, which byte and which moment follow from `--seed`; what a moment hits depends on the machine.
"""

import argparse
import contextlib
import importlib
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

STEPS, EVERY = 30, 3
_STEP_SECONDS = 0.02  # a step of the tiny model is quicker than a save, which no real one is
_LIMIT = 240.0  # seconds that a run may take
_LOST_AFTER = 5.0  # seconds until a process that says nothing is lost to the others
IMPORTS = (  # of a run, all of them: forks need not bring them
    "jaxtune.run", "jaxtune.cli", "orbax.checkpoint", "transformers.models.auto.tokenization_auto", "grain",
    "matplotlib.backends.backend_agg", "tensorboardX.event_file_writer",
)  # fmt: skip


class Lab:
    """A tiny model, its data and the undisturbed run."""

    def __init__(self, folder: Path, processes: int = 1) -> None:
        self.folder, self.processes = folder, processes
        if (child := os.fork()) == 0:  # making it uses a device
            _write(folder)
            os._exit(0)
        assert _wait(child, time.monotonic() + _LIMIT) == 0

    def command(self, out: Path) -> list[str]:
        """The command of a run."""
        settings = {
            "model": self.folder / "model", "output": out, "data.train": self.folder / "sums.jsonl",
            "data.max_length": 32, "data.cache": "false", "train.compute_dtype": "float32", "train.remat": "none",
            "train.batch_size": 4, "train.steps": STEPS, "train.log_every": 1, "optim.learning_rate": 1e-2,
            "tuning.method": "full", "checkpoint.every": EVERY,
        }  # fmt: skip
        return ["train", *(f"{k}={v}" for k, v in settings.items())]

    def start(self, out: Path, before: Callable[[], None] = lambda: None) -> list[int]:
        """Begin the run in processes of their own; `before` is called in them. Their ids."""
        sys.stdout.flush()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{s.getsockname()[1]}"
        ids = []
        for i in range(self.processes):
            if (child := os.fork()) == 0:
                if self.processes > 1:
                    os.environ |= {
                        "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(self.processes),
                        "JAX_PROCESS_ID": str(i), "JAXTUNE_LOST_AFTER": str(_LOST_AFTER),
                    }  # fmt: skip
                _be_a_run(self.command(out), out.with_suffix(f".{i}.log"), before)
            ids.append(child)
        return ids

    def finish(self, out: Path, before: Callable[[], None] = lambda: None) -> int:
        """The run to its end. Its exit code."""
        return max(_wait(i, time.monotonic() + _LIMIT) for i in self.start(out, before))

    def result(self, out: Path) -> Any:
        """What a run ends with: its losses by step, and the bytes of its weights."""
        from jaxtune import log

        losses = {m["step"]: m["loss"] for m in log.read_metrics(out / "metrics.jsonl") if "loss" in m}
        return losses, {f.name: f.read_bytes() for f in sorted((out / "export").glob("*.safetensors"))}


def _write(folder: Path) -> None:
    """A tiny model and forty sums."""
    from jaxtune.layers import Rope
    from jaxtune.models.decoder import DecoderConfig
    from tools.make_demo_model import write_jsonl, write_random_model, write_tokenizer

    shape = DecoderConfig(
        vocab=300, embed=16, layers=2, heads=2, kv_heads=1, head=8, mlp=24, tied=True,
        ropes=(Rope(8, context=64),), context=64,
    )  # fmt: skip
    write_random_model(folder / "model", shape, 0)
    write_tokenizer(folder / "model", ["1 + 2 = 3", "the fox eats berries"] * 50, 300)
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(8) for b in range(8)]
    write_jsonl(folder / "sums.jsonl", rows)


def _be_a_run(command: list[str], said: Path, before: Callable[[], None]) -> NoReturn:
    """What a forked process is from here on."""
    code = 1
    try:
        os.setsid()
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        from jaxtune import cli, log, saving

        saving.PAUSES = (0.05, 0.05)  # type: ignore[assignment]
        step = log.RunLog.step

        def slower(*args: Any, **options: Any) -> None:
            step(*args, **options)
            time.sleep(_STEP_SECONDS)

        log.RunLog.step = slower  # type: ignore[method-assign]
        before()
        cli.main(command)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, deadline: float) -> int:
    """A process's exit code, or minus the signal that ended it; it is killed at the deadline."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.002)


def _said(out: Path) -> str:
    return "".join(f.read_text(errors="replace") for f in sorted(out.parent.glob(f"{out.name}.*.log")))


def _last_step(out: Path) -> int:
    from jaxtune import log

    return max((m["step"] for m in log.read_metrics(out / "metrics.jsonl") if "loss" in m), default=0)


def _newest(out: Path) -> int:
    return max((int(f.name) for f in (out / "checkpoints").glob("*") if f.name.isdecimal()), default=0)


def kills(lab: Lab, n: int, chance: random.Random, duration: float, wanted: Any) -> Counter[str]:
    """Kill runs `n` times, up to four times each, then let each end."""
    found: Counter[str] = Counter()
    run = 0
    while found["kills"] < n:
        run += 1
        out = lab.folder / f"killed-{lab.processes}-{run}"
        for _ in range(min(chance.randint(1, 4), n - found["kills"])):
            saving, delay = chance.random() < 0.5, chance.random()
            children = lab.start(out)
            hit = _moment(out, children, chance.randint(1, 4) if saving else 0, delay, duration)
            victims = children if chance.random() < 0.5 else [chance.choice(children)]
            for child in victims:
                os.kill(child, signal.SIGKILL)
            deadline = time.monotonic() + 12 * _LOST_AFTER
            codes = [_wait(c, deadline) for c in children]
            if len(victims) < len(children) and not (out / "export").exists():  # else JAX's own end was hit
                aborts = children[0] in victims  # with the coordinator, JAX ends the others before the watch does
                left = [code for child, code in zip(children, codes, strict=True) if child not in victims]
                found["survivors"] += len(left)
                found["survivors that ended by themselves as told"] += sum(
                    code == 75 or (aborts and code == -signal.SIGABRT) for code in left
                )
            if all(code == 0 for code in codes):
                found["too late"] += 1
                break
            found["kills"] += 1
            found["kills while saving"] += hit
            taken, whole = _last_step(out), _newest(out)
            when = "while saving" if hit else "between saves"
            found[f"steps lost {when}, most"] = max(found[f"steps lost {when}, most"], taken - whole)
            # a save that goes on makes the next one wait: twice the interval may be lost then
            found[f"steps lost {when}, too many"] += max(0, taken - whole - (2 * EVERY if hit else EVERY))
        code = lab.finish(out)
        found["runs"] += 1
        resumed = [int(s) for s in re.findall(r"goes on after step (\d+)", _said(out))]
        found["resumed from whole checkpoints"] += len(resumed)
        found["bit-equal"] += code == 0 and lab.result(out) == wanted
        if code == 0 and lab.result(out) == wanted:
            _clear(out)
        else:
            print(f"{out}: ended with {code}, and differs or is not whole; kept", flush=True)
    return found


def _moment(out: Path, children: list[int], saves: int, delay: float, duration: float) -> bool:
    """Wait for a moment to kill at: in a save, or anywhere in the run for 0 saves. Whether a save is going on."""
    deadline = time.monotonic() + (2 * duration if saves else duration * delay)
    old, seen = {f.name for f in (out / "checkpoints").glob("*.saving*")}, set()  # old: of one that was killed
    while time.monotonic() < deadline:
        now = {f.name for f in (out / "checkpoints").glob("*.saving*")}
        old &= now
        seen |= {name.split(".")[0] for name in now - old}
        if saves and len(seen) >= saves:
            time.sleep(0.06 * delay)
            break
        if any(os.waitid(os.P_PID, c, os.WEXITED | os.WNOHANG | os.WNOWAIT) for c in children):
            break
        time.sleep(0.001)
    return any((out / "checkpoints").glob("*.saving*"))


def damage(place: Path, chance: random.Random) -> str:
    """Change, cut, swap or delete one file of a checkpoint. What was done."""
    files = sorted(f for f in place.rglob("*") if f.is_file() and f.stat().st_size)
    file, how = chance.choice(files), chance.choice(("bit", "cut", "swap", "delete", "zero"))
    content = bytearray(file.read_bytes())
    if how == "bit":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    elif how == "cut":
        file.write_bytes(content[: chance.randrange(len(content))])
    elif how == "zero":
        file.write_bytes(bytes(len(content)))
    elif how == "delete":
        file.unlink()
    else:
        other = chance.choice([f for f in files if f.read_bytes() != bytes(content)])
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    return f"{how} {file.relative_to(place)}"


def corruptions(lab: Lab, n: int, chance: random.Random, wanted: Any) -> Counter[str]:
    """Damage the newest checkpoint of a stopped run, at times the two newest, and go on."""
    found: Counter[str] = Counter()
    base = lab.folder / "stopped"
    base.mkdir()
    children = lab.start(base)
    while _last_step(base) < 20:
        time.sleep(0.005)
    (base / "STOP").touch()
    assert max(_wait(c, time.monotonic() + _LIMIT) for c in children) == 75
    for i in range(n):
        out = lab.folder / f"damaged-{i}"
        shutil.copytree(base, out)
        steps = sorted((int(f.name) for f in (out / "checkpoints").iterdir() if f.name.isdecimal()), reverse=True)
        hit = steps[: chance.choice((1, 1, 1, 2, len(steps)))]
        done = [damage(out / "checkpoints" / str(s), chance) for s in hit]
        code, said = lab.finish(out), _said(out)
        found["checkpoints damaged"] += len(hit)
        found["trials"] += 1
        named = all(f"checkpoints/{s}: this checkpoint is damaged" in said for s in hit)
        refused = code == 2 and "every checkpoint is damaged" in said
        same = code == 0 and lab.result(out) == wanted
        found["named"] += named or refused
        found["bit-equal from an older one"] += same
        found["refused, all being damaged"] += refused
        found["silent corruptions"] += code == 0 and not same
        if same or refused:
            _clear(out)
        else:
            print(f"{out}: {'; '.join(done)}: ended with {code}; kept", flush=True)
    return found


def full(lab: Lab, n: int, chance: random.Random, wanted: Any) -> Counter[str]:
    """Let files grow no further than some bytes from a random step on, in half of the runs only for a while."""
    found: Counter[str] = Counter()
    for i in range(n):
        out, size = lab.folder / f"full-{i}", chance.choice((200, 2_000, 20_000))
        first = chance.randrange(1, STEPS - 4)
        last = chance.randrange(first + 1, STEPS - 2) if chance.random() < 0.5 else STEPS + 1
        piped = out.with_suffix(".piped")

        def before(first: int = first, last: int = last, size: int = size, piped: Path = piped) -> None:
            from jaxtune import log, saving

            saving._FIRST = 0.1
            step, unlimited = log.RunLog.step, resource.RLIM_INFINITY
            _say_through_a_pipe(piped)

            def limited(self: Any, at: int, *rest: Any, **options: Any) -> None:
                step(self, at, *rest, **options)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size if first <= at < last else unlimited, unlimited))

            log.RunLog.step = limited  # type: ignore[method-assign, assignment]

        code = lab.finish(out, before)
        deadline = time.monotonic() + 20
        while not piped.exists() and time.monotonic() < deadline:  # until all is written that was said
            time.sleep(0.01)
        piped.unlink(missing_ok=True)
        said = _said(out)
        found["runs"] += 1
        found["took all their steps"] += _last_step(out) == STEPS or f"step {STEPS}/{STEPS}" in said
        found["failing saves, said"] += len(re.findall(r"cannot save a checkpoint", said))
        # the last step may have been saved in pieces that are small enough: then the export alone failed
        told = "could not be saved" in said or _newest(out) == STEPS
        found["ended with an error that says what is lost"] += code == 2 and told
        found["ended with an error"] += code == 2
        if code == 2 and not told:
            print(f"{out}: ended with {said.strip().splitlines()[-1:]}", flush=True)
        found["bit-equal at once"] += code == 0 and lab.result(out) == wanted
        if code != 0:
            code = lab.finish(out)
        found["bit-equal in the end"] += code == 0 and lab.result(out) == wanted
        if code == 0 and lab.result(out) == wanted:
            _clear(out)
        else:
            print(f"{out}: full from step {first} to {last} at {size} bytes: ended with {code}; kept", flush=True)
    return found


def _say_through_a_pipe(done: Path) -> None:
    """Let another process write what this one says, as the file would be limited too; at the end it makes `done`."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.close(write)
        while piece := os.read(read, 2**16):
            os.write(1, piece)
        done.touch()
        os._exit(0)
    os.close(read)
    os.dup2(write, 1)
    os.dup2(write, 2)
    os.close(write)


def _clear(out: Path) -> None:
    shutil.rmtree(out)
    for f in out.parent.glob(f"{out.name}.*.log"):
        f.unlink()


@contextlib.contextmanager
def _place(given: str | None) -> Iterator[Path]:
    if given:
        yield Path(given).absolute()
    else:
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            yield Path(folder)


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign and print its table. 0 if every run ended as it should."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=10)
    p.add_argument("--corrupt", type=int, default=8)
    p.add_argument("--full", type=int, default=2)
    p.add_argument("--processes", type=int, default=1, help="of each run that is killed")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--work", help="a folder to work in, which is kept; a temporary one where not given")
    o = p.parse_args(arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with _place(o.work) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "xla"))
        _import_everything()
        chance, tables, good = random.Random(o.seed), {}, True
        lab = Lab(folder, o.processes)
        lab.finish(folder / "warm")  # compiles
        began = time.monotonic()
        assert lab.finish(folder / "undisturbed") == 0, _said(folder / "undisturbed")
        duration, wanted = time.monotonic() - began, lab.result(folder / "undisturbed")
        print(f"an undisturbed run of {STEPS} steps takes {duration:.1f} s", flush=True)
        if o.kills:
            t = tables[f"{o.kills} kills, {o.processes} process(es)"] = kills(lab, o.kills, chance, duration, wanted)
            good &= t["bit-equal"] == t["runs"] and not t["steps lost between saves, too many"]
            good &= t["survivors that ended by themselves as told"] == t["survivors"]
        lab.processes = 1
        if o.processes > 1 and (o.corrupt or o.full):
            assert lab.finish(folder / "alone") == 0
            wanted = lab.result(folder / "alone")
        if o.corrupt:
            t = tables[f"{o.corrupt} damaged run folders"] = corruptions(lab, o.corrupt, chance, wanted)
            good &= not t["silent corruptions"] and t["named"] == t["trials"]
        if o.full:
            t = tables[f"{o.full} full disks"] = full(lab, o.full, chance, wanted)
            good &= t["bit-equal in the end"] == t["runs"]
            good &= t["ended with an error that says what is lost"] == t["ended with an error"]
    for title, t in tables.items():
        print(f"\n{title}")
        for name, value in t.items():
            print(f"  {name:<46} {value}")
    print("\nall as it should be" if good else "\nNOT all as it should be")
    return 0 if good else 1


def _import_everything() -> None:
    """What runs need, without touching a device: forks must not share one."""
    from jax._src import xla_bridge

    for name in IMPORTS:
        importlib.import_module(name)
    assert not xla_bridge.backends_are_initialized()


if __name__ == "__main__":
    sys.exit(main())
