"""The fastest setting that fits: many are estimated by rule, the promising few are compiled.

What is learned stays as it is asked for: rows of a step, their length, what trains. Tried are how rows go in
micro-batches, what remat keeps, how the mesh is split, and a base in 4 or 8 bits where adapters allow one.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jaxtune import config as configs
from jaxtune import log
from jaxtune.config import Adapter, Config, Mesh
from jaxtune.errors import UserError
from jaxtune.job import Job
from jaxtune.planning import How, imagined, report
from jaxtune.planning.report import Report, aligned, table
from jaxtune.planning.topology import Topology

_SLACK = 1.25  # a rule may be wrong by so much before what it refuses is not compiled


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search gives."""

    topology: Topology
    given: Config
    best: Report | None  # None: nothing fits
    tried: int  # settings
    compiled: list[Report]
    nearest: Report  # the least memory, by rule

    def changes(self) -> dict[str, Any]:
        """The keys of the best setting that differ from what was given."""
        if self.best is None:
            return {}
        old, new = self.given.model_dump(mode="json"), self.best.config.model_dump(mode="json")
        out: dict[str, Any] = {}
        for section in ("train", "mesh", "tuning"):
            changed = {k: v for k, v in new[section].items() if old[section].get(k) != v}
            if changed:
                out[section] = {**({"method": new[section]["method"]} if section == "tuning" else {}), **changed}
        return out

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "topology": self.topology.name,
            "tried": self.tried,
            "compiled": [r.to_dict() for r in self.compiled],
            "best": None if self.best is None else self.best.to_dict(),
            "changes": self.changes(),
        }

    def text(self) -> str:
        """Lines to read, and YAML to paste."""
        out = [f"{self.topology.name}: {self.tried} settings by rule, {len(self.compiled)} of them compiled"]
        out += [f"  {line}" for line in aligned(table(self.compiled))] if self.compiled else []
        if self.best is None:
            least = self.compiled[-1] if self.compiled else self.nearest
            out.append(f"nothing fits: the least takes {log.size(least.compiled.peak)} a chip, "
                       f"{log.size(least.over)} too many; {least.advice()}")  # fmt: skip
            return "\n".join(out)
        out.append("the fastest that fits:" if self.changes() else "the fastest that fits is as given")
        if self.changes():
            out.append(configs.dump_tree(self.changes()).rstrip())
        return "\n".join([*out, *(f"  {name}: {value}" for name, value in self.best.lines() if name == "estimate")])


def search(
    c: Config,
    t: Topology,
    prices: Mapping[str, float] | None = None,
    tries: int = 4,
    how: How = "full",
    cache: bool = True,
) -> Found:
    """Find the fastest setting of a config on a machine, compiling at most `tries` steps.

    Raises:
      UserError: no setting is possible at all, or the chip is not known.
    """
    if t.chip is None:
        raise UserError(f"topology {t.name}: without a known chip no setting can be called the fastest; name a TPU")
    guesses: list[Report] = []
    refused = ""
    jobs: dict[str, Job] = {}
    for candidate in settings(c, t):
        key = f"{candidate.mesh} {candidate.tuning}"
        try:
            jobs[key] = jobs[key] if key in jobs else imagined(candidate, t)
            guesses.append(report(candidate, t, "rule", prices, cache, jobs[key]))
        except UserError as e:
            refused = str(e)
    if not guesses:
        raise UserError(f"topology {t.name}: no setting is possible; {refused}")
    guesses.sort(key=_slowness)
    limit = max(r.limit or 0.0 for r in guesses)
    likely = [r for r in guesses if r.compiled.peak <= limit * _SLACK]
    least = min(guesses, key=lambda r: r.compiled.peak)
    done: list[Report] = []
    for guess in (likely or [least])[:tries]:
        got = guess if how == "rule" else report(guess.config, t, how, prices, cache)
        done.append(got)
        if sum(bool(r.fits) for r in done) == 2:
            break
    if not any(r.fits for r in done) and least not in likely[:tries] and likely and how != "rule":
        done.append(report(least.config, t, how, prices, cache))
    fitting = [r for r in done if r.fits]
    best = min(fitting, key=_slowness) if fitting else None
    return Found(t, c, best, len(guesses), done, least)


def _slowness(r: Report) -> tuple[float, float]:
    """The estimated time, and of settings that are alike in it, that without overlapping."""
    assert r.times is not None  # the chip is known
    return round(r.times.overlapped, 3), r.times.one_by_one


def settings(c: Config, t: Topology) -> Iterator[Config]:
    """Configs that differ in how they are computed."""
    bases: list[Any] = [c.tuning]
    if isinstance(c.tuning, Adapter) and c.tuning.base is None:
        bases += [c.tuning.model_copy(update={"base": base}) for base in ("int8", "nf4")]
    elif isinstance(c.tuning, Adapter) and c.tuning.base == "nf4":
        bases.append(c.tuning.model_copy(update={"base": "int8"}))
    meshes = [c.mesh]
    for strategy in ("fsdp", "fsdp_tensor", "context"):
        own = Mesh(strategy=strategy, slices=c.mesh.slices, over_slices=c.mesh.over_slices, rules=c.mesh.rules)
        if own.sizes != c.mesh.sizes and (t.devices > 1):
            meshes.append(own)
    for mesh in meshes:
        for accumulation in _accumulations(c, mesh, t):
            for remat in ("none", "dots", "full"):
                for tuning in bases:
                    train = c.train.model_copy(update={"accumulation": accumulation, "remat": remat})
                    yield c.model_copy(update={"train": train, "mesh": mesh, "tuning": tuning})


def _accumulations(c: Config, mesh: Mesh, t: Topology) -> list[int]:
    """Ways to cut a batch with at least a row for each part of the mesh."""
    split = 1
    for axis in ("tensor", "context", "stage"):
        n = mesh.sizes[axis]
        split *= t.devices if n == -1 else n
    shards = max(t.devices // max(split, 1), 1)
    B = c.train.batch_size
    return [a for a in (1, 2, 4, 8, 16, 32) if B % a == 0 and B // a >= shards] or [c.train.accumulation]
