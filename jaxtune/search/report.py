"""What a sweep found: a table, best.yaml, sweep.json, figures as PNG, and one page that needs nothing else."""

import html
import json
import math
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from jaxtune import config, log
from jaxtune.search import plots
from jaxtune.search.study import Store
from jaxtune.search.trials import shown

JSON, PAGE, BEST_CONFIG = "sweep.json", "sweep.html", "best.yaml"
_STATES = {TrialState.COMPLETE: "done", TrialState.PRUNED: "ended early", TrialState.FAIL: "failed"}


def facts(store: Store, t: FrozenTrial) -> dict[str, Any]:
    """A trial as JSON has it."""
    known: dict[str, Any] = {
        k: t.user_attrs[k] for k in ("pruned_at", "reason", "seconds", "compile_seconds") if k in t.user_attrs
    }
    facts: dict[str, Any] = {
        "number": t.number,
        "state": _STATES.get(t.state, "running"),
        "value": t.value if t.state == TrialState.COMPLETE else None,
        "values": t.params,
        "evaluations": {str(n): x if math.isfinite(x) else None for n, x in t.intermediate_values.items()},
        "folder": str(store.folder_of(t.number))
        if t.user_attrs.get("place") == store.place
        else t.user_attrs.get("place"),
    }
    return facts | known


def table(store: Store) -> list[str]:
    """The trials as lines, the best first."""
    trials = store.trials()
    sign = 1 if store.study.direction == optuna.study.StudyDirection.MINIMIZE else -1

    def order(t: FrozenTrial) -> tuple:
        done = t.state == TrialState.COMPLETE and t.value is not None
        return not done, sign * (t.value or 0.0) if done else 0.0, t.number

    rows = [["trial", store.config.evaluate.metric, "state", "seconds", "values"]]
    for t in sorted(trials, key=order):
        f = facts(store, t)
        how = f["state"] + (f" at {f['pruned_at']}" if "pruned_at" in f else "")
        value = "" if f["value"] is None else f"{f['value']:.4f}"
        why = f"  ({f['reason'][:100]})" if "reason" in f else ""
        rows.append([str(t.number), value, how, f"{f['seconds']:.1f}" if "seconds" in f else "", shown(t.params) + why])
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def write(store: Store) -> None:
    """Write what a sweep found so far into its folder."""
    trials, best = store.trials(), store.best()
    metric, folder = store.config.evaluate.metric, store.folder
    found = {
        "metric": metric,
        "direction": store.study.direction.name.lower(),
        "best": None if best is None else facts(store, best),
        "trials": [facts(store, t) for t in trials],
    }
    log.write_whole(folder / JSON, json.dumps(found, indent=1) + "\n")
    if best is None:
        return
    values = store.space.named(best.params)
    c = store.space.config(values, str(folder / "best"))
    head = (
        f"# The best of {len(trials)} trials: {metric} {best.value:.6g}, of trial {best.number}.\n"
        f"# jaxtune train {BEST_CONFIG}\n"
    )
    log.write_whole(folder / BEST_CONFIG, head + config.dump(c))
    importance = _importance(store)
    plots.history(trials, best, metric, folder / "history.png")
    plots.parallel(trials, store.sweep, metric, folder / "parallel.png")
    if importance:
        plots.importance(importance, metric, folder / "importance.png")
    log.write_whole(folder / PAGE, _page(store, bool(importance)))


def _importance(store: Store) -> dict[str, float]:
    """How much of what trials differ in each key explains; nothing where that cannot be said yet."""
    done = [t for t in store.trials() if t.state == TrialState.COMPLETE]
    if len(done) < 4 or len({t.value for t in done}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(store.study, evaluator=evaluator)


def _page(store: Store, importance: bool) -> str:
    metric = store.config.evaluate.metric
    v = optuna.visualization
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what figures leave out
        figures = [v.plot_optimization_history(store.study, target_name=metric)]
        if importance:
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            figures.append(v.plot_param_importances(store.study, evaluator=evaluator))
        figures.append(v.plot_parallel_coordinate(store.study, target_name=metric))
        if any(t.intermediate_values for t in store.trials()):
            figures.append(v.plot_intermediate_values(store.study))
        parts = [f.to_html(full_html=False, include_plotlyjs=i == 0) for i, f in enumerate(figures)]
    title = html.escape(f"Sweep {store.folder.name}: {metric}")
    rows = html.escape("\n".join(table(store)))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>\n'
        f'<body style="font-family: sans-serif; max-width: 70rem; margin: 2rem auto">\n<h1>{title}</h1>\n'
        f"<pre>{rows}</pre>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def best_folder(store: Store) -> Path | None:
    """The run folder of the best trial, where it is on this machine."""
    best = store.best()
    if best is None or best.user_attrs.get("place") != store.place:
        return None
    return store.folder_of(best.number)
