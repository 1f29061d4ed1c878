"""A plan as numbers, as text, and as a table of several."""

import dataclasses
from typing import Any

from jaxtune import log
from jaxtune.config import Config
from jaxtune.planning import estimate
from jaxtune.planning.compiled import Compiled, State
from jaxtune.planning.counting import Count
from jaxtune.planning.estimate import Seconds
from jaxtune.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Report:
    """What a config takes on a machine. Bytes and seconds are of one device, and of one step.

    >>> [r] = jaxtune.plan("llama3-8b-lora.yaml", "v5e-8", model="llama3.1-8b")  # doctest: +SKIP
    >>> r.fits, r.speed  # tokens per second and chip  # doctest: +SKIP
    """

    config: Config
    topology: Topology
    state: State
    compiled: Compiled
    how: str  # "compiled", "compiled with 2 and 3 layers", "by rule"
    count: Count  # of one token
    tokens: int  # of a step, over all devices
    mesh: dict[str, int]
    times: Seconds | None
    price: float | None = None  # of a chip and hour, in dollars

    @property
    def chips(self) -> int:
        return max(self.topology.devices, 1) // self.topology.cores

    @property
    def limit(self) -> float | None:
        """Bytes that a program may take."""
        return self.compiled.limit or estimate.usable(self.topology.chip)

    @property
    def fits(self) -> bool | None:
        """Whether it does; None where the memory is not known."""
        if self.limit is None:
            return None
        return self.compiled.fits and self.compiled.peak <= self.limit

    @property
    def speed(self) -> float | None:
        """Tokens per second and chip, estimated."""
        return None if self.times is None else self.tokens / self.times.overlapped / self.chips

    @property
    def mfu(self) -> float | None:
        """The share of the chip's arithmetic that useful operations take, estimated."""
        if self.times is None:
            return None
        useful = self.count.total * self.tokens / self.chips / self.topology.cores
        return estimate.utilisation(self.topology.chip, useful, self.times.overlapped)

    @property
    def cost(self) -> float | None:
        """Dollars for a million tokens."""
        return None if self.price is None or self.speed is None else estimate.cost(self.price, self.speed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        c, r = self.config, self.compiled.reading
        return {
            "topology": self.topology.name,
            "chips": self.chips,
            "how": self.how,
            "fits": self.fits,
            "memory": {
                "peak": self.compiled.peak,
                "limit": self.limit,
                "trained": self.state.trained,
                "frozen": self.state.frozen,
                "optimiser": self.state.optimiser,
                "batch": self.state.batch,
                "activations": None if r is None else r.saved - r.offloaded,
                "temporaries": None if r is None else self._rest,
            },
            "flops_per_token": {**self.count._asdict(), "total": self.count.total},
            "matrix_flops": None if r is None else dict(r.flops),
            "bytes_moved": None if r is None else r.moved,
            "collectives": [] if r is None else [
                {"kind": kind, "axes": axes, "bytes": sent} for (kind, axes), sent in r.by_kind().items()
            ],
            "seconds": None if self.times is None else {**self.times._asdict(), "step": self.times.overlapped},
            "tokens_per_second_per_chip": self.speed,
            "mfu": self.mfu,
            "dollars_per_million_tokens": self.cost,
            "rule": estimate.rule(self.topology.chip),
            "settings": {
                "model": c.model, "tuning": c.tuning.method, "max_length": c.data.max_length,
                "batch_size": c.train.batch_size, "accumulation": c.train.accumulation, "remat": c.train.remat,
                "mesh": {a: n for a, n in self.mesh.items() if n > 1},
            },
        }  # fmt: skip

    @property
    def _rest(self) -> float:
        r = self.compiled.reading
        return 0.0 if r is None else max(self.compiled.temporaries - (r.saved - r.offloaded), 0.0)

    def lines(self) -> list[tuple[str, str]]:
        """Names and values for a table."""
        c, r, s = self.config, self.compiled.reading, self.state
        mesh = ", ".join(f"{a} {n}" for a, n in self.mesh.items() if n > 1) or "one device"
        name = self.topology.chip.name if self.topology.chip else self.topology.platform
        again = ", kept from an earlier plan" if self.compiled.cached else ""
        verdict = {True: "fits", False: "DOES NOT FIT", None: "memory of the chip not known"}[self.fits]
        of = "" if self.limit is None else f" of {log.size(self.limit)} that a program may take"
        out = [
            ("machine", f"{self.topology.name}: {self.chips} × {name}; {mesh}"),
            ("run", f"{c.model}, {c.tuning.method}; {c.train.batch_size} rows of {c.data.max_length} tokens in "
                    f"{c.train.accumulation} micro-batch{'es' if c.train.accumulation > 1 else ''}, "
                    f"remat {c.train.remat}"),
            ("how", self.how + again),
            ("memory", f"{verdict}: {log.size(self.compiled.peak)} a chip{of}"),
        ]  # fmt: skip
        if (over := self.over) > 0:
            out.append(("over", f"by {log.size(over)}; {self.advice()}"))
        out.append(("  state", f"weights {log.size(s.trained)} trained, {log.size(s.frozen)} frozen; "
                               f"optimiser {log.size(s.optimiser)}; batch {log.size(s.batch)}"))  # fmt: skip
        if r is not None:
            host = f"; {log.size(r.offloaded)} more in the host's memory" if r.offloaded else ""
            out.append(("  beside", f"activations {log.size(r.saved - r.offloaded)} kept for the backward pass{host}; "
                                    f"temporaries {log.size(self._rest)}"))  # fmt: skip
        n = self.count
        out.append(("FLOPs a token", f"{_giga(n.total)} G useful: forward {_giga(n.forward)}, gradients of "
                                     f"inputs {_giga(n.inputs)}, of weights {_giga(n.weights)}, attention "
                                     f"{_giga(n.attention)}"))  # fmt: skip
        if r is not None:
            done = sum(r.flops.values()) + r.kernel_flops
            share = done * self.topology.devices / self.tokens
            out.append(("  computed", f"{_giga(share)} G in matrix products, with what is computed again"))
            for (kind, axes), sent in list(r.by_kind().items())[:6]:
                out.append((f"  {kind}", f"{log.size(sent)} sent by each chip over {axes}"))
            for loop in r.unknown_loops:
                out.append(("  not known", f"how often the loop {loop} goes round; it counts once"))
        if self.times is not None:
            t = self.times
            out.append(("time", f"arithmetic {_time(t.arithmetic)}, memory {_time(t.memory)}, network "
                                f"{_time(t.network)}: bound by {t.bound}"))  # fmt: skip
            slowest = self.tokens / t.one_by_one / self.chips
            mfu = f", MFU {100 * self.mfu:.0f} %" if self.mfu is not None else ""
            out.append(("estimate", f"{_time(t.overlapped)} a step, {self.speed:,.0f} tokens/s a chip{mfu}; "
                                    f"{slowest:,.0f} if nothing overlaps"))  # fmt: skip
            if self.cost is not None:
                out.append(("cost", f"${self.cost:.3f} for a million tokens at ${self.price:g} a chip and hour"))
        out.append(("rule", estimate.rule(self.topology.chip)))
        return out

    @property
    def over(self) -> float:
        """Bytes too many."""
        return 0.0 if self.fits is not False or self.limit is None else self.compiled.peak - self.limit

    def advice(self) -> str:
        """What would take the bytes too many away."""
        c, s, ways = self.config, self.state, []
        rows = c.train.batch_size // c.train.accumulation
        activations = self.compiled.peak - s.total
        if activations > self.over and rows > self.chips:
            ways.append(
                f"train.accumulation={c.train.accumulation * 2} halves {log.size(activations)} beside the state"
            )
        if c.train.remat in ("none", "dots"):
            ways.append("train.remat=full keeps only each layer's input")
        base = getattr(c.tuning, "base", None)
        if s.frozen and base is None:
            ways.append(f"tuning.base=nf4 would hold {log.size(s.frozen)} of frozen weights in about a quarter")
        if s.optimiser > self.over and not c.optim.offload:
            ways.append(f"optim.offload=true moves {log.size(s.optimiser)} to the host")
        if s.trained > 2 * s.frozen:
            ways.append("tuning.method=lora trains a small part")
        ways.append(f"{2 * self.chips} chips would take about {log.size(s.total / 2)} less each")
        return "; ".join(ways[:3])


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _giga(n: float) -> str:
    """In units of 10⁹, small numbers with two digits that count."""
    return f"{n / 1e9:.2f}" if n >= 1e8 or not n else f"{n / 1e9:.2g}"


def table(reports: list[Report]) -> list[list[str]]:
    """A row for each report under a row of names."""
    priced = any(r.cost is not None for r in reports)
    head = ["topology", "rows × length", "remat", "peak", "fits", "GFLOPs/token", "sent a step", "step",
            "tokens/s/chip", "MFU", *(["$/M tokens"] if priced else [])]  # fmt: skip
    out = [head]
    for r in reports:
        c, read = r.config, r.compiled.reading
        sent = "–" if read is None else log.size(sum(x.sent for x in read.collectives))
        steps = f"{c.train.batch_size} × {c.data.max_length}" + (
            f" / {c.train.accumulation}" if c.train.accumulation > 1 else ""
        )
        out.append([
            r.topology.name, steps, c.train.remat, log.size(r.compiled.peak),
            {True: "yes", False: "no", None: "?"}[r.fits], f"{r.count.total / 1e9:.1f}", sent,
            "–" if r.times is None else _time(r.times.overlapped),
            "–" if r.speed is None else f"{r.speed:,.0f}",
            "–" if r.mfu is None else f"{100 * r.mfu:.0f} %",
            *(["–" if r.cost is None else f"{r.cost:.3f}"] if priced else []),
        ])  # fmt: skip
    return out


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows as lines of columns.

    >>> aligned([["a", "bc"], ["def", "g"]])
    ['a    bc', 'def  g']
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows]
