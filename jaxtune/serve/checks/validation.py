"""A training file looked through before a job is queued: every bad line with what to do, tokens, distributions.

The file is read a line at a time. What is kept of a line is a hash and a few numbers, so that memory stays bounded by
the limit on examples; the rows themselves appear in no log. Tokens are made as training makes them, with the base
model's tokenizer and chat template, of the first `COUNTED` examples; the sums are scaled up where there are more.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxtune.data import encode, templates
from jaxtune.data.formats import chat
from jaxtune.errors import UserError
from jaxtune.hf import tokenizer
from jaxtune.serve.checks import checking, lines
from jaxtune.serve.checks.lines import Finding
from jaxtune.serve.settings import Limits

Role = Literal["training_file", "validation_file"]
LEAST = 10  # examples of a training file
COUNTED = 50_000  # examples whose tokens are counted
_SHOWN = 5  # bad lines in a job's error, and places of a remark
_LABELS = 32  # distinct completions that are told as labels, if each comes often
_LABEL = 80  # characters of a label
_BINS = 20
_EVERY = 256  # lines between looks at `stop`
REMARKS = {
    "missing_system": "have no system message",
    "missing_user": "have no user message",
    "last_not_assistant": "do not end with the assistant; what comes after its last message is not learnt",
    "near_empty": "have an empty answer",
    "duplicate": "are there more than once",
    "in_validation": "are in the validation file too, so its loss will look too good",
    "too_long": "are longer than {max_length} tokens and will be cut at their end",
    "nothing_trained": "have nothing that is trained on within {max_length} tokens and will be left out",
}
_NAMES = {"training_file": "Training", "validation_file": "Validation"}


@dataclass(frozen=True)
class Remark:
    """Something odd that does not stop a job: how many examples, and the lines of the first."""

    check: str
    count: int
    lines: list[int]
    message: str


@dataclass(frozen=True)
class Spread:
    """How numbers are distributed; `bins` are [from, to, how many]."""

    min: int
    p5: float
    median: float
    mean: float
    p95: float
    max: int
    bins: list[list[int]]


@dataclass(frozen=True)
class Tokens:
    """Tokens of a file under a model's tokenizer."""

    max_length: int
    counted: int
    """Examples that were counted; sums are scaled to all of them."""
    total: int
    """Of all examples, each cut to max_length."""
    trained: int
    """Of those, the ones with loss, before anything is cut."""
    longer: int
    """Examples longer than max_length."""
    lengths: Spread


@dataclass(frozen=True)
class Report:
    """What was found in a file."""

    role: str
    file: str
    """Its id."""
    bytes: int
    format: str | None
    """chat, completion or preference."""
    examples: int
    """Good ones."""
    error_count: int
    errors: list[Finding]
    """The first of them."""
    checks: dict[str, int]
    """How often each check failed."""
    remarks: list[Remark]
    messages: Spread | None
    """Of an example."""
    tokens: Tokens | None
    labels: dict[str, int] | None
    """How often each completion comes, where there are few."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def failure(self, method: str = "supervised") -> tuple[str, str, str] | None:
        """Code, message and param of the error that the file is, if it is one."""
        code, name = f"invalid_{self.role}", _NAMES[self.role].lower()
        said = f"The job failed due to an invalid {name} file. "
        if self.errors:
            first = "; ".join(str(e) for e in self.errors[:_SHOWN])
            more = f"; and {self.error_count - _SHOWN} more" if self.error_count > _SHOWN else ""
            if self.errors[0].message == checking.UNKNOWN:
                return code, said + checking.UNKNOWN, self.role
            return code, f"{said}Invalid file format. {_capital(first)}{more}", self.role
        if self.format is not None and (wanted := checking.METHODS[self.format]) != method:
            return code, (
                f"{said}Input file {self.file} is in the fine-tune-{self.format} format, but the specified fine-tuning "
                f"job is not using '{wanted}' as the training method (provided method={method})."
            ), self.role  # fmt: skip
        least = LEAST if self.role == "training_file" else 1
        if self.examples < least:
            least_said = f"must have at least {least} example{'s' if least > 1 else ''}"
            had = f"{_NAMES[self.role]} file has {self.examples} example(s), but {least_said}"
            return "invalid_n_examples", had, self.role
        if self.tokens is not None and not self.tokens.trained:
            return code, f"{said}No example has anything to train on; give the assistant's messages weight 1", self.role
        return None


def inspect(
    path: Path,
    model: Path,
    limits: Limits,
    max_length: int,
    role: Role,
    other: Path | None = None,
    *,
    template: str = "auto",
    stop: Callable[[], None] | None = None,
) -> Report:
    """Look through a file.

    Args:
      path: of a file in storage, named by its id.
      model: the folder whose tokenizer and chat template it is for.
      limits: what a line and a file may have.
      max_length: tokens of an example, from where it is cut.
      role: what the job uses it as.
      other: a validation file in which its rows should not be.
      template: "auto" or the name of a chat template.
      stop: called now and then; raises to leave.

    Raises:
      UserError: the model's tokenizer or the template cannot be read. What is wrong with the file is in the report.
    """
    seen = _Seen(limits, max_length, tokenizer.load(model), template, role)
    with path.open("rb") as f:
        for number, row in lines.objects(f, limits):
            if stop is not None and number % _EVERY == 1:
                stop()
            seen.add(number, row)
            if seen.examples > limits.examples:
                seen.fault(Finding(None, "", "too_many_examples", f"more than {limits.examples} examples; split it"))
                break
    if other is not None:
        seen.compare(_hashes(other, limits, stop))
    return seen.report(path)


def _hashes(path: Path, limits: Limits, stop: Callable[[], None] | None) -> "array[int]":
    out = array("Q")
    with path.open("rb") as f:
        for number, row in lines.objects(f, limits):
            if stop is not None and number % _EVERY == 1:
                stop()
            if isinstance(row, dict):
                out.append(_hash(row))
    return out


def _hash(row: dict[str, Any]) -> int:
    return int.from_bytes(hashlib.blake2b(lines.canonical(row), digest_size=8).digest(), "little")


class _Seen:
    """What is kept of the lines so far."""

    def __init__(self, limits: Limits, max_length: int, words: Any, template: str, role: Role) -> None:
        self.limits, self.max_length, self.words, self.wanted, self.role = limits, max_length, words, template, role
        self.format: str | None = None
        self.template: str | None = None
        self.examples, self.error_count = 0, 0
        self.errors: list[Finding] = []
        self.checks: Counter[str] = Counter()
        self.remarked: dict[str, list[int]] = {}
        self.remark_count: Counter[str] = Counter()
        self.hashes, self.numbers = array("Q"), array("Q")
        self.messages, self.lengths = array("L"), array("L")
        self.trained = 0
        self.labels: Counter[str] | None = Counter()

    def fault(self, finding: Finding) -> None:
        self.error_count += 1
        self.checks[finding.check] += 1
        if len(self.errors) < self.limits.errors_listed:
            self.errors.append(finding)

    def remark(self, check: str, number: int) -> None:
        self.remark_count[check] += 1
        if len(found := self.remarked.setdefault(check, [])) < _SHOWN:
            found.append(number)

    def add(self, number: int, row: dict[str, Any] | Finding) -> None:
        if isinstance(row, Finding):
            return self.fault(row)
        self.format = self.format or checking.format_of(row)
        if self.format is None:
            return self.fault(Finding(number, "", "unknown_format", checking.UNKNOWN))
        if found := list(checking.findings(row, self.format, number)):
            for finding in found:
                self.fault(finding)
            return None
        try:
            if self.format != checking.PREFERENCE:
                self._count(number, row, self.format)
        except UserError as e:
            said = str(e).removeprefix(f"{number}: ")
            return self.fault(Finding(number, "", "template" if "template" in said else "data_type", said))
        self.examples += 1
        self.hashes.append(_hash(row))
        self.numbers.append(number)
        for check in checking.remarks(row, self.format):
            self.remark(check, number)
        self._label(checking.completion(row, self.format))
        return None

    def _count(self, number: int, row: dict[str, Any], format: str) -> None:
        """Read the row as training does, and count its tokens. Raises: UserError: training would refuse it."""
        made = (chat.messages if format == checking.CHAT else chat.prompt_completion)(row, str(number), {})
        self.messages.append(len(made.messages))
        if len(self.lengths) >= COUNTED:
            return
        if self.template is None:
            own = getattr(self.words, "chat_template", None)
            self.template, _ = templates.choose(self.wanted, own, made.format)
        e = encode.tokens(made, self.words, encode.Settings(self.template))
        self.lengths.append(len(e.ids))
        self.trained += int(e.mask[1:].sum())
        if len(e.ids) > self.max_length:
            self.remark("too_long", number)
        if not e.mask[1:].any():
            self.remark("nothing_trained", number)

    def _label(self, text: str | None) -> None:
        if self.labels is not None:
            if text is None or len(text) > _LABEL:
                self.labels = None
            else:
                self.labels[text] += 1
                if len(self.labels) > _LABELS:
                    self.labels = None

    def compare(self, others: "array[int]") -> None:
        both = np.isin(np.array(self.hashes, np.uint64), np.array(others, np.uint64))
        for i in np.flatnonzero(both):
            self.remark("in_validation", self.numbers[int(i)])

    def report(self, path: Path) -> Report:
        _, first = np.unique(np.array(self.hashes, np.uint64), return_index=True)
        again = np.ones(self.examples, bool)
        again[first] = False
        for i in np.flatnonzero(again):
            self.remark("duplicate", self.numbers[int(i)])
        remarks = [
            Remark(check, n, self.remarked[check], _remark(check, n, self.examples, self.max_length))
            for check, n in sorted(self.remark_count.items())
        ]
        labels = self.labels
        if labels is not None and (len(labels) < 2 or len(labels) * 3 > self.examples):
            labels = None
        return Report(
            self.role, path.name, path.stat().st_size, self.format, self.examples, self.error_count, self.errors,
            dict(self.checks), remarks, _spread(self.messages), self._tokens(),
            dict(labels.most_common()) if labels else None,
        )  # fmt: skip

    def _tokens(self) -> Tokens | None:
        if not self.lengths:
            return None
        counted = len(self.lengths)
        scale = max(1.0, self.examples / counted)
        total = int(np.minimum(np.array(self.lengths), self.max_length).sum() * scale)
        lengths = _spread(self.lengths)
        assert lengths is not None
        longer = int(self.remark_count["too_long"] * scale)
        return Tokens(self.max_length, counted, total, int(self.trained * scale), longer, lengths)


def _spread(numbers: "array[int]") -> Spread | None:
    if not numbers:
        return None
    x = np.array(numbers, np.int64)
    low, high = int(x.min()), int(x.max())
    counts, edges = np.histogram(x, bins=min(_BINS, high - low + 1), range=(low, high + 1))
    bins = [[int(np.ceil(a)), int(np.ceil(b)) - 1, int(n)] for a, b, n in zip(edges, edges[1:], counts, strict=False)]
    p5, median, p95 = (float(p) for p in np.percentile(x, [5, 50, 95]))
    return Spread(low, p5, median, round(float(x.mean()), 2), p95, high, bins)


def _remark(check: str, n: int, examples: int, max_length: int) -> str:
    return f"{n:,} of {examples:,} examples {REMARKS[check].format(max_length=max_length)}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
