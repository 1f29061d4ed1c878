"""`jaxtune prepare`: one check after the other, a decision on each proposal, then the files."""

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jaxtune.config import Data, Source
from jaxtune.data import encode, pipeline
from jaxtune.data.encode import Settings
from jaxtune.data.examples import Conversation, Document
from jaxtune.errors import UserError
from jaxtune.prepare import report, rows
from jaxtune.prepare.checks import CHECKS
from jaxtune.prepare.checks.duplicates import groups
from jaxtune.prepare.finding import Finding, Look, apply
from jaxtune.prepare.report import Step
from jaxtune.prepare.rows import Row, Table
from jaxtune.prepare.split import split

OBJECTIVES = {"text": "pretrain", "qa": "span_qa"} | {
    f: f for f in ("classification", "regression", "token_classification")
}
Ask = Callable[[str, Finding, Table], bool]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do beside the checks."""

    out: Path
    checks: Sequence[str] = tuple(CHECKS)
    validation: Callable[[int], float] = lambda n: (
        0.1
    )  # what to hold out of `n` rows: a share or a number; 0 is nothing
    sample: int = 20
    seed: int = 0
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further keys of the next command


def prepare(source: Source, look: Look, plan: Plan, ask: Ask, tokenizer: Any = None) -> tuple[list[Step], str]:
    """Check, decide, split and write; the steps, and the command that trains on the result.

    Raises:
      UserError: the file cannot be read, or the folder holds files that are not ours.
    """
    table, unreadable = rows.open_table(source)
    inside = {plan.out.absolute() / n for n in ("train.jsonl", "validation.jsonl", "removed.jsonl")}
    if Path(source.path).absolute() in inside:
        raise UserError(f"{source.path}: lies where the result would go; give another folder with --out")
    if tokenizer is not None:
        look = dataclasses.replace(look, tokens=counter(tokenizer, table))
    removed: list[dict[str, Any]] = [
        {"origin": where.partition(": ")[0], "reason": where.partition(": ")[2]} for where in unreadable
    ]
    steps, before = [], table
    if removed:
        left_out = Finding("rows cannot be read and are left out", {})
        steps.append(Step("unreadable", left_out, True, [(r["origin"], r["reason"]) for r in removed]))
    for name in plan.checks:
        finding = CHECKS[name](table, look)
        accepted = bool(finding.proposal) and ask(name, finding, table)
        listed = [(table.rows[i].origin, finding.detail[i]) for i in finding.rows]
        steps.append(Step(name, finding, accepted, listed))
        if accepted:
            gone = sorted(finding.removes())
            why = {i: f"{name}: {finding.detail[i]}" for i in gone}
            removed += [
                {"origin": table.rows[i].origin, "reason": why[i], "row": table.written(table.rows[i].raw)}
                for i in gone
            ]
            table = apply(table, finding)
    if not table.rows:
        raise UserError(
            f"{source.path}: all {len(before)} rows would be removed; keep some, or leave checks out (--skip)"
        )
    train, held = list(range(len(table))), list[int]()
    if validation := plan.validation(len(table)):
        strata = [table.name_of_label(r.raw) for r in table.rows]
        train, held = split(strata, groups(table, look.near), validation, plan.seed)
    original = {r.origin: r.raw for r in before.rows}
    changed = sum(r.raw != original[r.origin] for r in table.rows)
    command = next_command(table, plan, bool(held))
    drawn = np.random.default_rng(plan.seed).permutation(len(table))[: plan.sample]
    sample = [table.rows[i] for i in sorted(drawn.tolist())]
    about = {
        "file": source.path, "format": table.format, "rows read": len(before), "unreadable": len(unreadable),
        "removed": len(before) - len(table), "changed": changed, "train": len(train), "validation": len(held),
        "seed": plan.seed,
    }  # fmt: skip
    files = {
        "train.jsonl": report.jsonl(table.written(table.rows[i].raw) for i in train),
        "removed.jsonl": report.jsonl(removed),
        "report.html": report.report_html(about, steps, command),
    }
    if held:
        files["validation.jsonl"] = report.jsonl(table.written(table.rows[i].raw) for i in held)
    if sample:
        files |= {"sample.html": report.sample_html(table, sample), "sample.csv": report.sample_csv(table, sample)}
    told = {"about": about, "checks": [s.told() for s in steps], "unreadable": unreadable, "next": command}
    report.write(plan.out, files, told)
    return steps, command


def next_command(table: Table, plan: Plan, validation: bool) -> str:
    """The exact command that trains on what was written."""
    keys: dict[str, Any] = {**plan.train, "data.train": str(plan.out / "train.jsonl")}
    if validation:
        keys["data.validation"] = str(plan.out / "validation.jsonl")
    keys["data.format"] = table.format
    keys |= {f"data.columns.{ours}": theirs for ours, theirs in table.columns.items()}
    keys |= {f"data.tags.{ours}": theirs for ours, theirs in table.tags.items()}
    if table.format in OBJECTIVES:
        keys["objective"] = OBJECTIVES[table.format]
    return shlex.join(["jaxtune", "train", *(f"{k}={_value(v)}" for k, v in keys.items())])


def _value(value: Any) -> str:
    """A value that YAML reads as what it is."""
    return str(value) if yaml.safe_load(str(value)) == value else json.dumps(value)


def counter(tokenizer: Any, table: Table) -> Callable[[Table, Row], int]:
    """How many tokens a row has, in its chat template where it has one; the texts alone of rows of other kinds."""
    examples = [e for r in table.rows[:100] if not isinstance(e := rows.example(table, r), str)]
    template = pipeline.choose_template(Data(), tokenizer, examples, [])
    settings = Settings(template, "all")

    def count(table: Table, row: Row) -> int:
        example = rows.example(table, row)
        if isinstance(example, Document) or (isinstance(example, Conversation) and template is not None):
            return len(encode.tokens(example, tokenizer, settings).ids)
        return len(tokenizer("\n".join(table.texts(row.raw))).input_ids)

    return count
