"""The fastest setting that fits: many are estimated by rule, the promising few are compiled.

Tried are how rows go in micro-batches, what remat keeps, how the mesh is split, a base in 4 or 8 bits where adapters
allow one, and half, twice and four times the rows of a step. The last alone changes what is learned, so it is said, and
taken only where a token costs less by some per cent. Length and what trains stay as they are asked for.
"""

import dataclasses
import itertools
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

_REMAT = ("none", "dots", "full")
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
        n = sum(r.how.startswith("compiled") for r in self.compiled)
        out = [f"{self.topology.name}: {self.tried} settings by rule, {n or 'none'} of them compiled"]
        out += [f"  {line}" for line in aligned(table(self.compiled))] if self.compiled else []
        if self.best is None:
            least = self.compiled[-1] if self.compiled else self.nearest
            out.append(f"nothing fits: the least takes {log.size(least.compiled.peak)} a chip, "
                       f"{log.size(least.over)} too many; {least.advice()}")  # fmt: skip
            return "\n".join(out)
        out.append("the fastest that fits:" if self.changes() else "the fastest that fits is as given")
        if self.changes():
            out.append(configs.dump_tree(self.changes()).rstrip())
        if "batch_size" in self.changes().get("train", {}):
            out.append("  train.batch_size is not as given: what is learned changes, and the learning rate may have to")
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

    def slowness(r: Report) -> tuple[float, bool, float]:
        """The estimated time of a token; of settings alike in it those with the rows asked for, then those that take
        less where nothing overlaps."""
        assert r.times is not None  # the chip is known
        each = r.times.overlapped / r.tokens
        return float(f"{each:.1e}"), r.config.train.batch_size != c.train.batch_size, r.times.one_by_one / r.tokens

    guesses.sort(key=slowness)
    limit = max(r.limit or 0.0 for r in guesses)
    least = min(guesses, key=lambda r: r.compiled.peak)
    done: list[Report] = []

    def attempt(guess: Report) -> None:
        nonlocal refused
        try:
            done.append(guess if how == "rule" else report(guess.config, t, how, prices, cache))
        except UserError as e:
            refused = str(e)

    ratio = 1.0 if how == "rule" else 1 / _SLACK  # of what is needed to what the rule says, as far as is known
    tried: list[Report] = []
    for guess in guesses:
        if len(tried) == tries or sum(bool(r.fits) for r in done) == 2:
            break
        if guess.compiled.peak * ratio <= limit:
            tried.append(guess)
            attempt(guess)
            ratio = done[-1].compiled.peak / guess.compiled.peak if done else ratio
    if not any(r.fits for r in done) and least not in tried:
        attempt(least)
    if not done:
        raise UserError(f"topology {t.name}: no setting that was tried is possible; {refused}")
    fitting = [r for r in done if r.fits]
    best = min(fitting, key=slowness) if fitting else None
    return Found(t, c, best, len(guesses), done, least)


def settings(c: Config, t: Topology) -> Iterator[Config]:
    """Configs that differ in how they are computed and in their rows, after the one that is given."""
    yield c
    bases: list[Any] = [c.tuning]
    if isinstance(c.tuning, Adapter) and c.train.matmuls == "same":
        others = {None: ("int8", "nf4"), "nf4": ("int8",)}.get(c.tuning.base, ())
        bases += [c.tuning.model_copy(update={"base": base}) for base in others]
    meshes = [c.mesh]
    for strategy in ("fsdp", "fsdp_tensor", "context"):
        own = Mesh(strategy=strategy, slices=c.mesh.slices, over_slices=c.mesh.over_slices, rules=c.mesh.rules)
        if own.sizes != c.mesh.sizes and (t.devices > 1):
            meshes.append(own)
    B = c.train.batch_size
    for mesh, rows in itertools.product(meshes, [B, *([B // 2] if B % 2 == 0 else []), 2 * B, 4 * B]):
        ways = _accumulations(c, rows, mesh, t)
        for accumulation, remat, tuning in itertools.product(ways, sorted({*_REMAT, c.train.remat}), bases):
            more = {"batch_size": rows, "accumulation": accumulation, "remat": remat}
            train = c.train.model_copy(update=more)
            if (new := c.model_copy(update={"train": train, "mesh": mesh, "tuning": tuning})) != c:
                yield new


def _accumulations(c: Config, rows: int, mesh: Mesh, t: Topology) -> list[int]:
    """Ways to cut a batch with at least a row for each part of the mesh."""
    split = 1
    for axis in ("tensor", "context", "stage"):
        n = mesh.sizes[axis]
        split *= t.devices if n == -1 else n
    shards = max(t.devices // max(split, 1), 1)
    found = [a for a in (1, 2, 4, 8, 16, 32) if rows % a == 0 and rows // a >= shards]
    return found or ([c.train.accumulation] if rows == c.train.batch_size else [])
