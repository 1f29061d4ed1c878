"""What a run tells: live in a terminal or a notebook, else plain lines; metrics.jsonl, TensorBoard events, loss.png."""

import contextlib
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune import display
from jaxtune.events import Events

_QUIET = re.compile("precision|recall|micro|weighted|_answer_")  # scores that are written but not shown
_WARNED: set[str] = set()
_HUSHED = False  # whether another process speaks and writes for this one
_WINDOW = 20  # steps over which the speed is taken


def hush() -> None:
    """From now on this process neither says nor writes what is said and written for all processes."""
    global _HUSHED
    _HUSHED = True


def hushed() -> bool:
    """Whether another process speaks and writes."""
    return _HUSHED


def say(text: str = "") -> None:
    """A plain line on standard output; who reads it may be gone, which stops nothing."""
    if not _HUSHED:
        try:
            print(text, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor does it at exit


def warn(text: str, everywhere: bool = False) -> None:
    """A line on standard error, once; `everywhere`: also where another process speaks, which may not know it."""
    if text not in _WARNED and (everywhere or not _HUSHED):
        _WARNED.add(text)
        print(f"warning: {text}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """
    >>> duration(5), duration(65), duration(3700)
    ('5 s', '1:05', '1:01:40')
    """
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60}:{s % 60:02}" if s < 3600 else f"{s // 3600}:{s % 3600 // 60:02}:{s % 60:02}"


def size(n_bytes: float) -> str:
    """
    >>> size(3_500_000), size(16e9)
    ('3.3 MiB', '14.9 GiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"


class Progress:
    """How much of some bytes is done: a live line in a terminal, else a line every few seconds."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self._live = max(total, 1), 0, sys.stdout.isatty()
        self._began = self._shown = time.perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._show()
        if self._live:
            print(flush=True)

    def add(self, n_bytes: int) -> None:
        """This many more are done."""
        self.done += n_bytes
        if time.perf_counter() - self._shown > (0.1 if self._live else 5.0):
            self._show()

    def _show(self) -> None:
        self._shown = time.perf_counter()
        if _HUSHED:
            return
        rate = self.done / max(self._shown - self._began, 1e-9)
        left = duration((self.total - self.done) / max(rate, 1e-9))
        share = 100 * self.done / self.total
        line = f"{size(self.done)} of {size(self.total)}  {share:.0f} %  {size(rate)}/s  {left} left"
        print(f"\r\x1b[K{line}" if self._live else line, end="" if self._live else "\n", flush=True)


def table(rows: Sequence[tuple[str, str]]) -> None:
    """Names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(f"  {name:<{width}}  {value}")


def sample(runs: Sequence[tuple[str, bool]], limit: int = 1500) -> None:
    """A training sample: what is trained on in colour, or between ⟦ and ⟧ where there is no colour."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    opened, closed = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    text = "".join(f"{opened}{t}{closed}" if trained else t for t, trained in runs)
    mark = "green" if colour else "⟦…⟧"
    cut = f"… ({len(text) - limit} more characters)" if len(text) > limit else ""
    say(f"one training sample ({mark} is trained on):")
    shown = text[:limit] + (closed if cut and colour else "") + cut
    say("\n".join(f"  | {line}" for line in shown.splitlines()))


class RunLog:
    """The log of a run folder. Lines past `start` (of a run that was killed) are dropped."""

    def __init__(
        self,
        folder: Path,
        start: int,
        total: int,
        metric: str = "loss",
        devices: int = 1,
        peak: float | None = None,
        also: Callable[[int, Mapping[str, float]], None] = lambda n, scalars: None,
    ) -> None:
        """Args:
        folder: the run folder.
        start: steps taken before.
        total: steps of the whole run.
        metric: the score that is always shown.
        devices: how many train.
        peak: what all of them can do together in FLOP/s, dense in bfloat16; None where that is not known.
        also: is given every line's step and scalars too.
        """
        self.devices, self.peak, self._also = devices, peak, also
        self.folder, self.total, self.start, self.metric = folder, total, start, metric
        self.file = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.history = [m for m in read_metrics(self.file) if m["step"] <= start]
        write_whole(self.file, "".join(json.dumps(e) + "\n" for e in self.history))
        self._live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not _HUSHED
        self._drawn = display.Live(total) if display.in_notebook() and not _HUSHED else None
        self._events: Events | None = None
        self._torn = False  # metrics.jsonl lacks what could not be written
        self._began, self._done, self._open = time.perf_counter(), 0, False
        self._idle_until = self._began
        self._ticks: deque[tuple[float, int, float]] = deque(maxlen=_WINDOW)

    def step(
        self,
        n: int,
        values: Mapping[str, float],
        tokens: int,
        write: bool,
        flops: float = 0.0,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        """After step `n`: `tokens` were read; a line is written where `write` says so, the live line always moves.

        `flops` are the useful ones of the step (`jaxtune.planning.counting`): those of padding and of what the backward
        pass computes again do not count. `seconds` is where the time of the run went up to here.
        """
        now = time.perf_counter()
        self._done += 1
        self._ticks.append((now, tokens, flops))
        eta = (now - self._began) / self._done * (self.total - n)
        began = self._ticks[0][0] if len(self._ticks) > 1 else self._idle_until
        took, counted = max(now - began, 1e-9), list(self._ticks)[len(self._ticks) > 1 :]
        rate = sum(t for _, t, _ in counted) / took
        speed = {"tokens_per_second": rate}
        if self.devices > 1:
            speed["tokens_per_second_per_device"] = rate / self.devices
        if self.peak:
            speed["mfu"] = sum(f for _, _, f in counted) / took / self.peak
        if write:
            self.write(n, {**values, **speed}, seconds)
        if write or self._live or self._drawn:
            self._show(n, values["loss"], speed, eta, final=write)

    def _show(self, n: int, loss: float, speed: Mapping[str, float], eta: float, final: bool) -> None:
        used = f"  {100 * speed['mfu']:.1f} % MFU" if "mfu" in speed else ""
        rate, left = f"{speed['tokens_per_second']:,.0f} tokens/s", f"{duration(eta)} left"
        line = f"step {n}/{self.total}  loss {loss:.4f}  {rate}{used}" + (f"  {left}" if n < self.total else "")
        if self._drawn:
            return self._drawn.show(n, line, self.history, at_once=n == self.total)
        if not self._live:
            return say(line)
        sys.stdout.write(f"\r\x1b[K{line}" + ("\n" if final else ""))
        sys.stdout.flush()
        self._open = not final

    def evaluation(self, n: int, values: Mapping[str, float]) -> None:
        """Scores on the validation set after step `n`."""
        if any(m["step"] == n and "eval_loss" in m for m in self.history):
            return
        self.write(n, {f"eval_{k}": v for k, v in values.items()})
        shown = "  ".join(f"{k} {v:.4f}" for k, v in values.items() if self._is_shown(k))
        self.line(f"step {n}/{self.total}  validation {shown}")
        self._ticks.clear()  # the time of an evaluation is not that of steps
        self._idle_until = time.perf_counter()
        if not self._done:
            self._began = self._idle_until

    def _is_shown(self, name: str) -> bool:
        return name == self.metric or not _QUIET.search(name)

    def line(self, text: str) -> None:
        """A line of its own, not in the live one."""
        say(("\r\x1b[K" if self._live else "") + text)

    def write(self, n: int, values: Mapping[str, float], seconds: Mapping[str, float] | None = None) -> None:
        """Append to metrics.jsonl and to the TensorBoard events; `seconds`, where time went, to the former alone."""
        entry: dict[str, Any] = {
            "step": n,
            "total_steps": self.total,
            **{k: round(float(v), 8) for k, v in values.items()},
        }
        if seconds is not None:
            entry["seconds"] = dict(seconds)
        self.history.append(entry)
        if _HUSHED:
            return
        with self._spared(self.file):
            self._torn, torn = True, self._torn
            if torn:  # whole again, without the half of a line
                write_whole(self.file, "".join(json.dumps(e) + "\n" for e in self.history))
            else:
                with self.file.open("a") as f:
                    f.write(json.dumps(entry) + "\n")
            self._torn = False
        with self._spared(self.folder / "events"):
            if self._events is None:
                self._events = Events(self.folder / "events", self.start + 1 if self.start else None)
            self._events.write(n, scalars(values))
        self._also(n, scalars(values))

    @contextlib.contextmanager
    def _spared(self, file: Path) -> Iterator[None]:
        """A disk that cannot be written does not end the run for the sake of its log."""
        try:
            yield
        except OSError as e:
            warn(f"{file}: cannot be written ({e.strerror}); training goes on, and it is tried again")

    def summary(self) -> None:
        """The first and the last scores on the validation set."""
        held = [m for m in self.history if "eval_loss" in m]
        if len(held) > 1:
            names = [k for k in held[-1] if k.startswith("eval_") and self._is_shown(k[5:])]
            self.line("validation " + ", ".join(f"{k[5:]} {held[0][k]:.4f} → {held[-1][k]:.4f}" for k in names))

    def close(self) -> None:
        """Flush everything and draw loss.png."""
        if self._open:
            say()
        if self._events is not None:
            with self._spared(self.folder / "events"):
                self._events.close()
        if _HUSHED:
            return
        with self._spared(self.folder / "loss.png"):
            plot(self.history, self.folder / "loss.png")


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line under the names that charts have.

    >>> scalars({"step": 3, "total_steps": 9, "loss": 1.5, "eval_loss": 2, "seconds": {"input": 1.0}})
    {'train/loss': 1.5, 'eval/loss': 2.0}
    """
    names = [k for k in values if k not in ("step", "total_steps", "seconds")]
    return {k.replace("eval_", "eval/", 1) if k.startswith("eval_") else f"train/{k}": float(values[k]) for k in names}


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl; a last line that was cut by a kill is left out."""
    entries = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if isinstance(entry, dict) and "step" in entry:
            entries.append(entry)
    return entries


def write_whole(file: Path, text: str) -> None:
    """Write a text file that is replaced when it is complete, or not at all; one process does it for all."""
    if _HUSHED:
        return
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def plot(history: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw training and validation loss over steps."""
    train = [(m["step"], m["loss"]) for m in history if "loss" in m]
    held = [(m["step"], m["eval_loss"]) for m in history if "eval_loss" in m]
    if not train and not held:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="#4477aa", linewidth=1.2, label="training")
    if held:
        axes.plot(*zip(*held, strict=True), color="#cc3311", marker="o", markersize=4, label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file)
