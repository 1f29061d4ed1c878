"""Verbs for data: prepare, augment, preview."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxtune import config, log
from jaxtune.cli.common import Dtype, Pairs, app, dtype_of, one_of, read_config
from jaxtune.errors import UserError, nearest

if TYPE_CHECKING:
    from jaxtune.prepare.finding import Finding
    from jaxtune.prepare.rows import Table

Keys = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the data section: format, columns.label=category, …"),
]
Format = Annotated[str | None, typer.Option("--format", help="What a row holds; told by its columns where not given.")]
Seed = Annotated[int, typer.Option(min=0, help="Of all that is drawn.")]
_LISTED = 5  # rows of a finding
_SHOWN = 3  # examples of a packed row


def source_of(file: str, keys: list[str] | None, format: str | None) -> config.Source:
    """The source that the arguments of a verb name."""
    given = config.nested({f"data.{k}": v for k, v in config.parse_overrides(keys or []).items()}).get("data", {})
    given |= {"format": format} if format else {}
    return config.load(None, config.nested({"data": {**given, "train": file}})).data.sources[0]


@app.command()
def prepare(
    file: Annotated[str, typer.Argument(help="Data of any kind that can be trained on.")],
    keys: Keys = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write to; FILE-prepared where not given.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing: accept what is safe, keep the rest.")] = False,
    model: Annotated[str | None, typer.Option(help="The model whose tokenizer counts tokens.")] = None,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens of a row above which it is too long.")] = 1024,
    format: Format = None,
    against: Annotated[str | None, typer.Option(help="A validation or test set that no row may stand in.")] = None,
    split: Annotated[
        float | None, typer.Option(min=0, help="Rows to hold out: a share or a number; 0.1, or 0 with --against.")
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="Rows to draw for a review by hand.")] = 20,
    words: Annotated[Path | None, typer.Option(help="Offensive terms, one a line.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this check; may be given several times.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Not this check; may be given several times.")] = None,
    near: Annotated[float, typer.Option(min=0.3, max=1.0, help="Similarity of near duplicates.")] = 0.8,
    seed: Seed = 0,
) -> None:
    """Look at data as a careful person does before training, repair it, split it, and report.

    Writes train.jsonl, validation.jsonl, removed.jsonl, sample.html, sample.csv, report.html and report.json; FILE
    stays as it is. With --yes these are accepted: mojibake, control, keys, emails, accounts, phones (masked), missing,
    duplicates, leakage. Others are listed and kept: extra, conflicts, near_duplicates (which stay on one side of the
    split), too_long, outliers, case, language, balance, label_errors, words.
    """
    from jaxtune import job
    from jaxtune.hf import tokenizer
    from jaxtune.prepare import rows, session
    from jaxtune.prepare.checks import CHECKS
    from jaxtune.prepare.finding import Look

    for name in (*(only or ()), *(skip or ())):
        if name not in CHECKS:
            raise UserError(f"no check is named {name!r}{nearest(name, list(CHECKS))}; there are {', '.join(CHECKS)}")
    source = source_of(file, keys, format)
    other = rows.open_table(source_of(against, keys, format))[0] if against else None
    look = Look(other, None, max_length, near, _terms(words) if words else (), seed)
    train = {"model": model, "data.max_length": max_length} if model else {}
    share = split if split is not None else 0.0 if against else 0.1
    plan = session.Plan(
        out or Path(f"{Path(source.path).with_suffix('')}-prepared"),
        [c for c in CHECKS if (not only or c in only) and c not in (skip or ())],
        (lambda n: share) if yes or split is not None else (lambda n: _ask_share(n, share)),
        sample,
        seed,
        train | ({"data.validation": against} if against and not share else {}),
    )
    loaded = tokenizer.load(job.model_folder(model)) if model else None
    steps, command = session.prepare(source, look, plan, _safe if yes else _ask, loaded)
    if yes:
        for step in steps:
            for remark in step.finding.remarks:
                log.say(f"{step.check}: {remark}")
            if step.rows:
                done = "done" if step.accepted else "kept"
                told = f"; {step.finding.proposal}: {done}" if step.finding.proposal else ""
                log.say(f"{step.check}: {len(step.rows)} {step.finding.title}{told}")
                for origin, detail in step.rows[:_LISTED]:
                    log.say(f"    {origin}: {detail}")
                if len(step.rows) > _LISTED:
                    log.say(f"    … {len(step.rows) - _LISTED} more in report.json")
    log.say(f"written to {plan.out}: {', '.join(sorted(p.name for p in plan.out.iterdir()))}")
    log.say(f"next: {command}")


def _safe(name: str, finding: "Finding", table: "Table") -> bool:
    return finding.safe


def _ask(name: str, finding: "Finding", table: "Table") -> bool:
    """Ask for a decision on a proposal."""
    log.say(f"\n{name}: {len(finding.detail)} {finding.title}")
    for remark in finding.remarks:
        log.say(f"    {remark}")
    default = "a" if finding.safe else "k"
    shown = 0
    while True:
        answer = _input(f"  {finding.proposal}? [a]pply, [k]eep, [l]ist ({default}): ").lower() or default
        if answer in ("a", "apply", "y", "yes"):
            return True
        if answer in ("k", "keep", "n", "no"):
            return False
        if answer in ("l", "list"):
            for i in finding.rows[shown : shown + 20]:
                log.say(f"    {table.rows[i].origin}: {finding.detail[i]}")
            shown = 0 if shown + 20 >= len(finding.detail) else shown + 20


def _ask_share(n: int, default: float) -> float:
    while True:
        answer = _input(f"\nhold out for validation, a share or a number of {n} rows, 0 for none ({default:g}): ")
        try:
            value = float(answer or default)
        except ValueError:
            continue
        if 0 <= value < n:
            return value


def _input(question: str) -> str:
    try:
        return input(question).strip()
    except EOFError as e:
        raise UserError("the input ended before all was decided, so nothing was written; answer, or give --yes") from e


def _terms(file: Path) -> list[str]:
    """The terms of a list, one a line; `#` begins a remark."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as e:
        raise UserError(f"--words {file}: no such file") from e
    except UnicodeDecodeError as e:
        raise UserError(f"--words {file}: not UTF-8 text; save it as UTF-8") from e
    return [term for line in lines if (term := line.partition("#")[0].strip())]


@app.command()
def augment(
    file: Annotated[str, typer.Argument(help="Data to train on; never data that is held back.")],
    keys: Keys = None,
    out: Annotated[Path, typer.Option(help="Where the rows and their copies go, as JSONL.")] = Path("augmented.jsonl"),
    eda: Annotated[str | None, typer.Option(help="Of swap, delete, insert, synonym, with commas between.")] = None,
    table: Annotated[Path | None, typer.Option(help='Synonyms for insert and synonym: {"big": ["large"]}.')] = None,
    typos: Annotated[str | None, typer.Option(help="Of keyboard, spelling, with commas between.")] = None,
    copies: Annotated[int, typer.Option(min=1, help="Copies of each row.")] = 1,
    rate: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the words that change.")] = 0.1,
    closest: Annotated[float, typer.Option(min=0.0, max=1.0, help="Similarity that a copy has with its row.")] = 0.3,
    column: Annotated[
        str | None, typer.Option(help="The column that changes; the format's own where not given.")
    ] = None,
    format: Format = None,
    paraphrase: Annotated[str | None, typer.Option(help="A model that paraphrases.")] = None,
    backtranslate: Annotated[
        list[str] | None, typer.Option(help="A model that translates; given twice, there and back.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Asks for a paraphrase.")] = "Say this in other words: {text}",
    there: Annotated[str, typer.Option(help="Asks for a translation.")] = "Translate to German: {text}",
    back: Annotated[str, typer.Option(help="Asks for the translation back.")] = "Translate to English: {text}",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer of a model.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    dtype: Dtype = "float32",
    seed: Seed = 0,
) -> None:
    """Multiply rows: small changes of words, typing errors, paraphrase and back-translation by a local model.

    Labels and answers stay; copies are marked. A copy that lost a number, a negation, a label's name or an answer's
    span, that is too far from its row or as it was, is dropped and counted.
    """
    from jaxtune.prepare import augment as work

    operations = [*_named("--eda", eda, work.EDA), *_named("--typos", typos, work.TYPOS)]
    if {*operations} & {"synonym", "insert"} and table is None:
        raise UserError("--eda synonym and insert need a table of synonyms; give it with --table")
    if not operations and paraphrase is None and not backtranslate:
        raise UserError("nothing to do was given; say --eda, --typos, --paraphrase or --backtranslate")
    if backtranslate and len(backtranslate) > 2:
        raise UserError("--backtranslate takes one model for both ways, or two")
    rewrites = {}
    if paraphrase or backtranslate:
        from jaxtune import tuned

        dtype_of(dtype)
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        names = dict.fromkeys([*([paraphrase] if paraphrase else []), *(backtranslate or [])])
        models = {name: tuned.open_model(name, None, dtype) for name in names}
        if paraphrase:
            rewrites["paraphrase"] = work.by_models([(models[paraphrase], prompt)], sampling, seed)
        if backtranslate:
            both = [(models[backtranslate[0]], there), (models[backtranslate[-1]], back)]
            rewrites["backtranslation"] = work.by_models(both, sampling, seed)
    synonyms = work.read_table(table) if table else {}
    options = work.Options(operations, synonyms, copies, rate, closest, seed, column)
    n, counts = work.augment(source_of(file, keys, format), out, options, rewrites)
    log.say(f"{n} rows read")
    for what, count in sorted(counts.items()):
        log.say(f"{count} copies: {what}")
    log.say(f"written to {out}")


def _named(option: str, given: str | None, allowed: tuple[str, ...]) -> list[str]:
    names = [n.strip() for n in given.split(",")] if given else []
    for n in names:
        one_of(option, n, list(allowed))
    return names


@app.command()
def preview(
    arguments: Pairs = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Rows to show.")] = 5,
    html: Annotated[Path | None, typer.Option(help="Write a page that shows every token.")] = None,
    seed: Seed = 0,
) -> None:
    """Show rows as the model will see them, and which tokens are trained on. No weights are read."""
    import jax

    from jaxtune.prepare import preview as work

    jax.config.update("jax_platforms", "cpu")
    made = work.prepared(read_config(arguments))
    rows = work.draw(made, n, seed)
    for remark in made.data.remarks:
        log.say(remark)
    log.table(work.about(made, work.template_of(made)))
    for row in rows:
        for line, runs in work.runs(made, row)[:_SHOWN]:
            log.say(f"\n{line}")
            log.sample(runs)
        if len(row.examples) > _SHOWN:
            log.say(f"\nrow {row.number}: {len(row.examples) - _SHOWN} more examples; --html shows all")
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        log.write_whole(html, work.html(made, rows))
        log.say(f"written to {html}")
