"""The text of an optimised HLO module as instructions, with the trips of its loops and the groups of its collectives.

The text form is what all back ends and versions give alike; XLA's own protocol buffers are not among jax's interfaces.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "f4e2m1fn": 4, "bf16": 16, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_END = re.compile(r"}(, execution_thread=.*)?")  # of a computation
VMEM, HOST = "S(1)", "S(5)"  # memory spaces in layouts of TPU


class Shape(NamedTuple):
    """An array's shape; several of them are a tuple's."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.size * bits(self.dtype) / 8

    @property
    def in_hbm(self) -> bool:
        return VMEM not in self.layout and HOST not in self.layout


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    shapes: list[Shape]  # of the result; one, but for tuples
    operands: list[str]
    rest: str  # attributes
    arguments: str  # what stands between the parentheses
    root: bool

    def attribute(self, name: str, pattern: str = r"%?([\w.\-]+)") -> str | None:
        """An attribute's value, None without it."""
        found = re.search(rf"\b{name}={pattern}", self.rest)
        return found[1] if found else None

    @property
    def op_name(self) -> str:
        """Where in the program it comes from, "" where that is not known."""
        return self.attribute("op_name", '"([^"]*)"') or ""

    @property
    def called(self) -> list[str]:
        """The computations that run once when it does."""
        found = re.findall(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)", self.rest)
        return [c for c in found if not re.search(rf"\bcondition=%?{re.escape(c)}\b", self.rest)]


Computation = dict[str, Instruction]


class Module(NamedTuple):
    """Computations by name."""

    computations: Mapping[str, Computation]
    entry: str

    def shape(self, computation: str, operand: str) -> list[Shape]:
        """The shapes of an operand; none where it is not of this computation."""
        found = self.computations[computation].get(operand)
        return found.shapes if found else []

    def root(self, computation: str) -> Instruction | None:
        """The instruction whose result is the computation's."""
        return next((i for i in self.computations.get(computation, {}).values() if i.root), None)


def bits(dtype: str) -> int:
    """Of one number.

    >>> bits("bf16"), bits("s4"), bits("f8e4m3fn"), bits("u32")
    (16, 4, 8, 32)
    """
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found[1]) if found else 0


def shapes(text: str) -> list[Shape]:
    """
    >>> shapes("(bf16[2,3]{1,0}, s32[])")[0].bytes, shapes("f32[4]")[0].dims
    (12.0, (4,))
    """
    return [
        Shape(dtype, tuple(int(n.strip("<=")) for n in dims.split(",") if n), layout or "")
        for dtype, dims, layout in _SHAPE.findall(text)
    ]


def read(text: str) -> Module:
    """Take a module's text apart."""
    computations: dict[str, Computation] = {}
    entry = ""
    here: Computation | None = None
    for line in _lines(text):
        if line.endswith("{") and ("(" in line or line.startswith("ENTRY")) and not line.startswith(" "):
            name = line.removeprefix("ENTRY ").split("(")[0].split()[0].strip().lstrip("%")
            here = computations[name] = {}
            entry = name if line.startswith("ENTRY") else entry
        elif _END.fullmatch(line):
            here = None
        elif here is not None and (found := _instruction(line)) is not None:
            here[found.name] = found
    return Module(computations, entry)


def _lines(text: str) -> Iterator[str]:
    """The lines of a text, each instruction in one: attributes of TPUs' kernels go over several."""
    held, within = "", False
    for line in text.splitlines():
        if within and line and not line.startswith(" ") and not _END.fullmatch(line):
            held += line
            continue
        yield held
        within = (within or line.endswith("{")) and not _END.fullmatch(line)
        held = line
    yield held


def _instruction(line: str) -> Instruction | None:
    left, equals, right = line.partition(" = ")
    if not equals:
        return None
    root = left.strip().startswith("ROOT")
    name = left.strip().removeprefix("ROOT").strip().lstrip("%")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.find(" ")
    opcode = _OPCODE.match(right, end)
    if opcode is None:
        return None
    close = _closing(right, opcode.end() - 1)
    inside = right[opcode.end() : close]
    operands = re.findall(r"%([\w.\-]+)", inside)
    return Instruction(name, opcode[1], shapes(right[:end]), operands, right[close + 1 :], inside, root)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for m in re.compile(r"[()]").finditer(text, start):
        depth += 1 if m[0] == "(" else -1
        if depth == 0:
            return m.start()
    return len(text) - 1


def trips(module: Module, computation: str, loop: Instruction) -> int | None:
    """How often a `while` goes round; None where the text does not say.

    Back ends that do not write it down leave it to be seen: a counter from a constant in steps of another, up to one.
    """
    if (known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)) is not None:
        return int(known[1])
    condition = module.computations.get(loop.attribute("condition") or "", {})
    test = next((i for i in condition.values() if i.root), None)
    if test is not None and test.opcode == "fusion":  # the comparison alone, in a fusion of its own
        inner = module.root(test.called[0])
        test = inner._replace(operands=test.operands) if inner is not None else None
    if test is None or test.opcode != "compare" or len(test.operands) != 2:
        return None
    counter, bound = (condition.get(o) for o in test.operands)
    begin = module.computations[computation].get(loop.operands[0])

    def at_first(i: Instruction | None) -> int | None:
        """The value before the first round: a constant's, here or where the loop is entered."""
        index = i.attribute("index", r"(\d+)") if i is not None else None
        if index is None or begin is None or begin.opcode != "tuple":
            return _constant(i)
        return _constant(module.computations[computation].get(begin.operands[int(index)]))

    index = counter.attribute("index", r"(\d+)") if counter is not None else None
    end = at_first(bound)
    if index is None or end is None:
        return None
    step = _step(module, loop.attribute("body") or "", index)
    distance = end - (at_first(counter) or 0) + (test.attribute("direction") == "LE")
    return max(-(-distance // step), 0)


def _step(module: Module, body: str, index: str) -> int:
    """By how much a counter grows in a round, 1 where that is not seen."""
    last, total = module.root(body), 0
    at = module.computations[body].get(last.operands[int(index)]) if last is not None else None
    while at is not None and at.opcode in ("add", "fusion", "copy"):
        operands = [module.computations[body].get(o) for o in at.operands]
        if at.opcode == "fusion":
            inner = module.root(at.called[0])
            if inner is None or inner.opcode != "add":
                return 1
            operands += [module.computations[at.called[0]].get(o) for o in inner.operands]
        total += sum(_constant(o) or 0 for o in operands)
        at = next((o for o in operands if o is not None and o.opcode in ("add", "fusion", "get-tuple-element")), None)
    return total or 1


def _constant(i: Instruction | None) -> int | None:
    if i is None or i.opcode != "constant" or not re.fullmatch(r"-?\d+", i.arguments.strip()):
        return None
    return int(i.arguments)


def groups(i: Instruction, devices: int) -> list[list[int]]:
    """Which devices a collective joins, all of them where it does not say."""
    text = i.rest
    if (pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", text)) is not None:
        return [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    if (plain := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", text)) is not None:
        return [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d, ]+)\}", plain[1])]
    if (iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)) is not None:
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1])).tolist()
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", text)
    if named is None:
        return [list(range(devices))]
    sizes = {k: int(n) for k, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
    ids = np.arange(math.prod(sizes.values()))
    if named[2] and (order := re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", named[2])) is not None:
        ids = _iota(order[1], order[2])
    split: list[int] = []  # an axis may be taken in part: 'a':(2)4 is the middle of 2 × 4 × rest
    joined: list[bool] = []
    wanted = {k: (int(p or 1), int(n or 0)) for k, p, n in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[3])}
    for k, size in sizes.items():
        before, part = wanted.get(k, (1, 0))
        part = (part or size) if k in wanted else 1
        split += [before, part, size // before // part]
        joined += [False, k in wanted, False]
    inner = [n for n, j in enumerate(joined) if j]
    outer = [n for n, j in enumerate(joined) if not j]
    members = math.prod(split[n] for n in inner)
    return ids.reshape(split).transpose(outer + inner).reshape(-1, members).tolist()


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(shape: str, order: str | None) -> np.ndarray:
    x = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (x.transpose(_numbers(order)) if order else x).reshape(-1)


def axes_of(members: list[list[int]], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of groups differ.

    >>> axes_of([[0, 1], [2, 3]], {"data": 2, "fsdp": 2})
    ('fsdp',)
    """
    places = np.stack(np.unravel_index(np.arange(math.prod(sizes.values())), tuple(sizes.values())), -1)
    varies = np.zeros(len(sizes), bool)
    for group in members:
        varies |= (places[group] != places[group[0]]).any(0)
    return tuple(name for name, v in zip(sizes, varies, strict=True) if v)


def walk(module: Module) -> Iterator[tuple[str, Instruction, float]]:
    """Each instruction that runs on its own, with its computation and how often it runs; not those inside of fusions.

    A loop of unknown length counts once, and gives itself with a negative number.
    """

    def inside(computation: str, times: float) -> Iterator[tuple[str, Instruction, float]]:
        for i in module.computations[computation].values():
            if i.opcode == "while":
                n = trips(module, computation, i)
                if n is None:
                    yield computation, i, -1
                for body in i.called:
                    yield from inside(body, times * (1 if n is None else n))
            elif i.opcode == "conditional":
                named = i.attribute("branch_computations", r"\{([^}]*)\}")
                both = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", i.rest)
                branches = [b.strip().lstrip("%") for b in named.split(",")] if named else both
                longest = max(branches, key=lambda b: len(module.computations[b]))
                yield from inside(longest, times)
            elif i.opcode == "call":
                for body in i.called:
                    yield from inside(body, times)
            else:
                yield computation, i, times

    yield from inside(module.entry, 1.0)
