"""`jaxtune quantize`: a model in fewer bits, in a format that others run, and what that did to it."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune import __version__, config, log
from jaxtune.compress import gguf, measure, ollama, rounding, writing
from jaxtune.compress.rounding import CALIBRATED, METHODS, How
from jaxtune.compress.writing import Opened
from jaxtune.data.pipeline import Rows
from jaxtune.errors import UserError
from jaxtune.hf import files, layout, load, quantized
from jaxtune.layers import unbox
from jaxtune.nodes import grid
from jaxtune.nodes.grid import Grid, Scheme, with_int8_products

Tree = Any
FORMATS = ("gptq", "hf", "gguf")
REPORT = "quantize.json"
MODEL_FILE = "model.gguf"
_BATCH = 8


class Wanted(NamedTuple):
    """What is asked for, made whole."""

    format: str
    dtype: str  # of `grid.DTYPES`, or of `gguf.DTYPES`
    how: How


def wanted(
    method: str = "rtn",
    dtype: str | None = None,
    format: str | None = None,
    group: int = 128,
    symmetric: bool = True,
    act_order: bool = False,
    strength: float = 0.5,
) -> Wanted:
    """What the options mean together.

    >>> wanted("gptq").dtype, wanted("gptq").format, wanted("smoothquant").format, wanted(format="gguf").dtype
    ('int4', 'gptq', 'hf', 'q4_k')

    Raises:
      UserError: one is not known, or they do not fit.
    """
    _known("--method", method, METHODS)
    if format is None:
        format = "hf" if method == "smoothquant" or dtype == "fp8" else "gguf" if dtype in gguf.DTYPES else "gptq"
    _known("--format", format, FORMATS)
    if act_order and method != "gptq":
        raise UserError(f"--act-order is for --method gptq, not {method}; leave it out")
    if not symmetric and format != "gptq":
        raise UserError(f"--asymmetric is for --format gptq, not {format}; leave it out")
    if format == "gguf":
        dtype = dtype or "q4_k"
        _known("--dtype of gguf", dtype, gguf.DTYPES)
        if method not in ("rtn", "awq") or (method == "awq" and dtype == "f16"):
            raise UserError(
                f"--format gguf: {dtype} is rounded by rtn or, of q8_0, q4_0 and q4_k, awq, not by {method}"
            )
        return Wanted(format, dtype, How(method, Scheme("int8" if dtype == "q8_0" else "int4", 32), clip=False))
    dtype = dtype or {"rtn": "int8", "smoothquant": "int8"}.get(method, "fp8" if format == "hf" else "int4")
    _known("--dtype", dtype, grid.DTYPES)
    if format == "gptq" and (dtype == "fp8" or method == "smoothquant"):
        raise UserError("--format gptq holds int4 and int8 weights; take --format hf for fp8 and for smoothquant")
    if format == "hf" and not (dtype == "fp8" or (method == "smoothquant" and dtype == "int8")):
        raise UserError("--format hf is for --dtype fp8 and for --method smoothquant; take --format gptq")
    if method == "smoothquant" and dtype != "int8":
        raise UserError("--method smoothquant is for int8, of weights and of activations")
    if format == "hf":
        group, symmetric = 0, True  # a scale for each output
    how = How(method, Scheme(dtype, group, symmetric), act_order, strength=strength)
    return Wanted(format, dtype, how)


def _known(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{option} {value!r} is not known; allowed: {', '.join(allowed)}")


def quantize(
    source: str,
    target: Path,
    want: Wanted,
    adapter: str | None = None,
    data: str | None = None,
    held_data: str | None = None,
    samples: int = 128,
    length: int = 2048,
    task: str | None = None,
    speed: bool = True,
) -> dict[str, Any]:
    """Write a quantised model, and measure it before and after.

    Args:
      source: a run, an export, an adapter or a model folder; adapters are merged first.
      target: the folder, which appears when it is complete.
      want: see `wanted`.
      adapter: to merge into the source.
      data: rows to calibrate with, and to measure with where `held_data` is not given: others of them.
      held_data: rows to measure with.
      samples: how many rows at most, of each.
      length: of a row, in tokens, at most the model's context.
      task: a task whose questions are in `held_data`, or in `data`, asked before and after.
      speed: whether to time decoding.

    Returns: what `quantize.json` holds.

    Raises:
      UserError: it cannot be opened, quantised so, or written.
    """
    files.refuse_full(target)
    opened = writing.open_for(source, adapter)
    c = opened.model.blueprint.decoder
    gguf.check(c) if want.format == "gguf" else rounding.check(c, want.how.scheme)
    if task is not None and not (held_data or data):
        raise UserError("--task: give the rows of its questions by --held-data FILE")
    calibration, held = _rows(opened, want, data, held_data, samples, length)
    about: dict[str, Any] = {
        "model": source, "adapter": adapter, "method": want.how.method, "format": want.format, "dtype": want.dtype,
        "group": want.how.scheme.group, "symmetric": want.how.scheme.symmetric, "jaxtune": __version__,
        "data": data, "held_data": held_data, "calibrated_on": len(calibration) if calibration else 0,
        "measured_on": len(held) if held else 0, "length": held.length if held else None,
    }  # fmt: skip

    def look(weights: Tree) -> dict[str, Any]:
        model = dataclasses.replace(opened.model, weights=weights)
        found: dict[str, Any] = {} if held is None else opened.scores(held, weights, _BATCH)
        if task is not None:
            found |= measure.task_scores(model, task, str(held_data or data), samples)
        if speed:
            found["decode_tokens_per_second"] = measure.decoding(model)
        return found

    with jax.set_mesh(opened.model.mesh):
        log.say("measuring the model as it is")
        before = {**look(opened.weights), "bytes": sum(t.nbytes for t in opened.source.tensors.values())}
        if want.format == "gguf":
            return _to_gguf(opened, target, want, calibration, about, before, look)
        weights, grids = _rounded(opened, want, calibration)
        lived = with_int8_products(weights) if want.how.method == "smoothquant" else weights
        entries = _entries(opened, want, weights, grids)
        after = {**look(lived), "bytes": sum(t.nbytes for t in entries.values())}
    report = {**about, "before": before, "after": after}
    side = {REPORT: (json.dumps(report, indent=2) + "\n").encode()}
    changes = {quantized.KEY: _config(want)}
    writing.write(target, opened, entries, changes, side, f"```\n{_text(report)}\n```")
    return report


def _rows(
    opened: Opened, want: Wanted, data: str | None, held_data: str | None, samples: int, length: int
) -> tuple[Rows | None, Rows | None]:
    """Rows to calibrate with, where the method needs them, and rows to measure with, where there are any."""
    needed = want.how.method in CALIBRATED
    if held_data is not None:
        held = writing.rows_for(opened, held_data, samples, length)
        return (writing.rows_for(opened, data, samples, length) if needed else None), held
    if not needed and data is None and opened.name != config.DEMO:
        log.say("no rows are given, so perplexity is not measured; --held-data FILE gives them")
        return None, None
    rows = writing.rows_for(opened, data, None, length)
    if not needed:
        return None, _some(rows, 0, samples)
    n = min(samples, max(1, len(rows) * 9 // 10))
    if n == len(rows):
        log.warn(
            f"{data or opened.name}: has one row of {length} tokens: it is measured on what it was "
            "calibrated on; --length is less"
        )
        return rows, rows
    return _some(rows, 0, n), _some(rows, n, samples)


def _some(rows: Rows, first: int, n: int) -> Rows:
    """Of rows in an order drawn by chance, the same each time."""
    drawn = np.random.default_rng(0).permutation(len(rows))[first : first + n]
    return dataclasses.replace(rows, rows=[rows.rows[i] for i in sorted(drawn)])


def _rounded(opened: Opened, want: Wanted, calibration: Rows | None) -> tuple[Tree, dict[str, Grid]]:
    c = opened.model.blueprint.decoder
    batches = writing.batches(calibration, _BATCH) if calibration is not None else []
    return rounding.rounded(
        c, opened.weights, want.how, batches, lambda i: log.say(f"layer {i + 1} of {c.layers} is rounded")
    )


def _entries(opened: Opened, want: Wanted, weights: Tree, grids: Mapping[str, Grid]) -> dict[str, files.Entry]:
    """The tensors of the folder: rounded matrices by their format, the others as ever."""
    out, family = writing.tensors(opened, weights), opened.model.blueprint.decoder.family
    for plain, found in grids.items():
        module = layout.hf_name(f"{plain}/weight", family).removesuffix(".weight")
        del out[f"{module}.weight"]
        if want.format == "gptq":
            out |= quantized.gptq_entries(module, found, want.how.scheme.bits)
        else:
            out |= quantized.channel_entries(module, found, want.dtype)
    return out


def _config(want: Wanted) -> dict[str, Any]:
    how = want.how
    if want.format == "gptq":
        return quantized.gptq_config(how.scheme, how.method, how.act_order, how.damp, __version__)
    return quantized.channel_config(want.dtype, how.method == "smoothquant", ["lm_head"])


def _to_gguf(
    opened: Opened, target: Path, want: Wanted, calibration: Rows | None, about: Any, before: Any,
    look: Callable[[Tree], dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """A folder with `model.gguf`, measured as it is in the file, and an Ollama Modelfile."""
    m, weights = opened.model, opened.weights
    b = m.blueprint
    if want.how.method == "awq":
        weights = rounding.folded(
            b.decoder, weights, want.how, writing.batches(calibration, _BATCH) if calibration else []
        )
    with files.whole(target) as folder:
        file, place = folder / MODEL_FILE, opened.source.folders[-1]
        types = gguf.write(
            file, b.decoder, writing.tensors(opened, weights), place, want.dtype, Path(opened.name).name, m.template
        )
        held = load.match(gguf.read(file, b.decoder), b.plain, b.decoder.family, b.decoder.tied, str(file))
        after = look(unbox(load.load(held, b.plain, b.places, b.decoder.family)))
        kinds = {k: sum(t == k for t in types.values()) for k in sorted(set(types.values()))}
        if odd := [n for n, t in types.items() if t not in ("F32", want.dtype.upper()) and n not in gguf.TABLES]:
            log.warn(f"{len(odd)} matrices such as {odd[0]} do not divide into {want.dtype}'s blocks: {types[odd[0]]}")
        report = {**about, "before": before, "after": {**after, "bytes": file.stat().st_size}, "types": kinds}
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        files.copy_files(opened.source.folders[0], folder, files.LICENCE_FILES)
        ends = m.tokenizer.convert_ids_to_tokens([i for i in m.eos if i < len(m.tokenizer)])
        text, remark = ollama.modelfile(MODEL_FILE, m.tokenizer, m.template, ends, m.system)
        if remark:
            log.say(remark)
        (folder / ollama.NAME).write_text(text, encoding="utf-8")
    return report


def table(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values to show: before, after."""
    rows = [("", f"{'before':>14} {'after':>14}")]
    for name, old in report["before"].items():
        new = report["after"][name]
        rows.append((name, f"{_shown(old):>14} {_shown(new):>14}"))
    return rows


def _shown(x: Any) -> str:
    return f"{x:,}" if isinstance(x, int) else f"{x:.4f}" if abs(x) < 100 else f"{x:.1f}"


def _text(report: Mapping[str, Any]) -> str:
    return "\n".join(f"{name:<28}{value}" for name, value in table(report))
