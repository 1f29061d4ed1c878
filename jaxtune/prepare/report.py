"""The files that `prepare` leaves: rows, what was removed and why, a sample to review, and the report."""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune import log
from jaxtune.errors import UserError
from jaxtune.prepare import page
from jaxtune.prepare.finding import Finding
from jaxtune.prepare.rows import Row, Table

REPORT = "report.json"
_MADE_BY = "jaxtune prepare"
_SHOWN = 50  # rows of a finding that the page lists


class Step(NamedTuple):
    """A check, what it found in which rows, and whether its proposal was accepted."""

    check: str
    finding: Finding
    accepted: bool
    rows: Sequence[tuple[str, str]]  # origin and detail

    def told(self) -> dict[str, Any]:
        """As report.json holds it."""
        f = self.finding
        done = "accepted" if self.accepted else "kept as they are" if f.proposal else "nothing to do"
        return {
            "check": self.check,
            "count": len(self.rows),
            "title": f.title,
            "proposal": f.proposal,
            "decision": done,
            "remarks": list(f.remarks),
            "counts": dict(f.counts),
            "rows": [{"origin": o, "detail": d} for o, d in self.rows],
        }


def jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSON lines; what JSON has no form for, such as dates, as text."""
    return "".join(_line(row) + "\n" for row in rows)


def _line(row: Mapping[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if text.isprintable() or _encodes(text) else json.dumps(row, default=str)


def _encodes(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def sample_csv(table: Table, rows: Sequence[Row]) -> str:
    """Rows to review in a spreadsheet, with columns for a verdict and a note."""
    columns = list(dict.fromkeys(c for r in rows for c in r.raw))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["origin", *columns, "good (y/n)", "note"])
    for r in rows:
        writer.writerow([r.origin, *(_cell(r.raw.get(c)) for c in columns), "", ""])
    return out.getvalue().encode("utf-8", "replace").decode()


def _cell(value: Any) -> str:
    """A value as a cell that no spreadsheet takes for a formula."""
    text = (
        value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    )
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def sample_html(table: Table, rows: Sequence[Row]) -> str:
    """Rows to read, one table each."""
    body = [f"<p>{len(rows)} rows drawn at random, of {len(table)}, as they are after the accepted proposals.</p>"]
    for r in rows:
        cells = (
            (c, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False, indent=1, default=str))
            for c, v in r.raw.items()
        )
        body.append(f"<h2>{page.escape(r.origin)}</h2>\n" + page.table(("column", "value"), cells))
    return page.page("Sample to review", "\n".join(body))


def report_html(about: Mapping[str, Any], steps: Sequence[Step], command: str) -> str:
    """The report as a page, with histograms."""
    body = [page.table(("", ""), [(k, v) for k, v in about.items()])]
    body.append("<h2>Checks</h2>")
    told = [s.told() for s in steps]
    body.append(page.table(("check", "rows", "what", "decision"),
                           [(t["check"], t["count"], t["title"], t["decision"]) for t in told]))  # fmt: skip
    for step, t in zip(steps, told, strict=True):
        f = step.finding
        if not (step.rows or f.remarks or f.counts or f.values):
            continue
        body.append(f"<h2>{page.escape(step.check)}: {len(step.rows):,} {page.escape(f.title)}</h2>")
        if f.proposal:
            body.append(f"<p>Proposed: {page.escape(f.proposal)}. Decision: {page.escape(t['decision'])}.</p>")
        body += [f"<p>{page.escape(r)}</p>" for r in f.remarks]
        body += [page.histogram(f.values, f.unit), page.bars(f.counts)]
        if step.rows:
            shown = page.table(("row", "what"), step.rows[:_SHOWN])
            more = f"<p>{len(step.rows) - _SHOWN:,} more in {REPORT}</p>" if len(step.rows) > _SHOWN else ""
            body.append(f"<details><summary>rows</summary>\n{shown}{more}</details>")
    body.append(f"<h2>Next</h2>\n<p><code>{page.escape(command)}</code></p>")
    return page.page("Data report", "\n".join(b for b in body if b))


def write(out: Path, files: Mapping[str, str], report: Mapping[str, Any]) -> None:
    """Write all files and report.json, which remembers what was written.

    Files of an earlier `prepare` that nobody changed since are replaced, or removed where they are not made any more.

    Raises:
      UserError: a file is there that was not made by `prepare`, or was changed since.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder with --out")
    before = _made(out)
    for name in sorted({*files, *before} | {REPORT}):
        place = out / name
        if not place.exists():
            continue
        if name == REPORT:
            if not before:
                raise UserError(f"{place}: was not made by `{_MADE_BY}`; give another folder with --out")
        elif name not in before:
            raise UserError(
                f"{place}: is there already and was not made by `{_MADE_BY}`; give another folder with --out"
            )
        elif _digest(place.read_bytes()) != before[name]:
            raise UserError(f"{place}: was changed since it was made; move it away, or give another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    digests = {name: _digest(text.encode()) for name, text in sorted(files.items())}
    whole = json.dumps({"made_by": _MADE_BY, **report, "files": digests}, indent=1, ensure_ascii=False)
    log.write_whole(out / REPORT, whole.encode("utf-8", "replace").decode() + "\n")
    for name, text in files.items():
        log.write_whole(out / name, text)
    for name in {*before} - {*files}:
        (out / name).unlink(missing_ok=True)


def _made(out: Path) -> dict[str, str]:
    """Digests of what an earlier `prepare` wrote into a folder."""
    try:
        found = json.loads((out / REPORT).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, json.JSONDecodeError):
        return {}
    ours = isinstance(found, dict) and found.get("made_by") == _MADE_BY and isinstance(found.get("files"), dict)
    return {k: v for k, v in found["files"].items() if Path(k).name == k} if ours else {}


def _digest(blob: bytes) -> str:
    return hashlib.blake2b(blob, digest_size=16).hexdigest()
