"""What `jaxtune train` leaves in a run folder, without training: as a class in this process, and as a program.

python fake_train.py SECONDS_A_STEP [LAST_WORDS EXIT_CODE] config.yaml
"""

import json
import signal
import sys
import time
from pathlib import Path
from typing import ClassVar

STEPS, EPOCH, KEEP = 12, 4, 3


class Run:
    """A run folder that goes on after its newest checkpoint, a step at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        saved = folder / "saved"
        self.step = int(saved.read_text()) if saved.exists() else 0
        self.metrics = folder / "metrics.jsonl"
        old = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        kept = [line for line in old if json.loads(line)["step"] <= self.step]
        temporary = folder / ".metrics"
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(self.metrics)
        if not kept:
            self._write({"step": 0, "eval_loss": 2.0, "eval_accuracy": 0.25})

    def _write(self, entry: dict) -> None:
        with self.metrics.open("a") as f:
            f.write(json.dumps({"total_steps": STEPS, **entry}) + "\n")

    def save(self) -> None:
        (self.folder / "saved").write_text(str(self.step))

    def advance(self) -> bool:
        """A step; whether it was the last."""
        if self.step < STEPS:
            self.step += 1
            self._write({"step": self.step, "loss": 1 / self.step, "accuracy": 0.5, "tokens_per_second": 10.0})
            if self.step % EPOCH == 0:
                self._write({"step": self.step, "eval_loss": 1.0, "eval_accuracy": 0.5})
                self._export(self.folder / "exports" / f"step-{self.step}")
                self.save()
        if self.step == STEPS:
            self._export(self.folder / "export")
        return self.step == STEPS

    def _export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text("{}")


class FakeChild:
    """In the place of `child.Child`: takes a step at each look. `between` is called before, `breaks` at which steps it
    ends by itself, once each."""

    between = staticmethod(lambda step: None)
    breaks: ClassVar[set[int]] = set()

    def __init__(self, folder: Path, config: Path, command: object = None) -> None:
        assert config.read_text()
        self.run, self.code, self.asked = Run(folder / "run"), None, False

    def poll(self) -> int | None:
        if self.code is None:
            type(self).between(self.run.step)
        if self.code is None:
            done = self.run.advance()
            if self.run.step in self.breaks:
                self.breaks.discard(self.run.step)
                self.code = 1
            elif done:
                self.code = 0
            elif self.asked:
                self.run.save()
                self.code = 75
        return self.code

    def ask(self) -> None:
        self.asked = True

    terminate = ask

    def kill(self) -> None:
        self.code = -9 if self.code is None else self.code

    def last_line(self) -> str:
        return "error: /srv/x/y: no"


def main(pause: float, words: str, code: int, config: str) -> int:
    import yaml

    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    run = Run(Path(yaml.safe_load(Path(config).read_text())["output"]))
    print(words, flush=True)
    if code:
        return code
    while not run.advance():
        time.sleep(pause)
        if told or (run.folder / "STOP").exists():
            (run.folder / "STOP").unlink(missing_ok=True)
            run.save()
            return 75
    return 0


if __name__ == "__main__":
    pause, *last, config = sys.argv[1:]
    words, code = last or ("begins", "0")
    sys.exit(main(float(pause), words, int(code), config))
