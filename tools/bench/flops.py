"""Matrix-product FLOPs of the compiled step, read from its optimised HLO, beside the count by hand."""

import math
import re
from pathlib import Path

from tools.bench import contenders as c

_SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def compiled(text: str) -> float:
    """FLOPs of all dots in optimised HLO: 2 × elements of the result × contracted size, times the trips of loops."""
    bodies: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if line.endswith("{") and ("(" in line or line.startswith("ENTRY")):
            name = line.removeprefix("ENTRY ").split("(")[0].split()[0].strip().lstrip("%")
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            bodies[name].append(line)

    def dims(operand: str, body: list[str]) -> list[int]:
        inline = _SHAPE.match(operand.strip())
        if inline is None:
            ref = re.escape(operand.strip().lstrip("%").split()[-1])
            definition = next(x for x in body if re.match(rf"\s*(ROOT )?%?{ref} = ", x))
            inline = _SHAPE.search(definition.split(" = ", 1)[1])
        assert inline is not None
        return [int(n) for n in inline[1].split(",") if n]

    def cost(name: str) -> float:
        total = 0.0
        for line in bodies[name]:
            if " dot(" in line:
                result = _SHAPE.search(line.split(" = ", 1)[1])
                assert result is not None
                out = math.prod(int(n) for n in result[1].split(",") if n)
                lhs = re.search(r" dot\((\w+\[[^\]]*\](?:\{[^}]*\})? )?%?([\w.\-]+)", line)
                assert lhs is not None
                shape = dims(lhs[1] or lhs[2], bodies[name])
                axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
                assert axes is not None
                total += 2 * out * math.prod(shape[int(i)] for i in axes[1].split(",") if i)
            trips = 1
            if " while(" in line:
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                if known is None:
                    raise ValueError(f"a loop of unknown length: {line.strip()[:120]}")
                trips = int(known[1])
            for called in re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", line):
                total += trips * cost(called)
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                total += max(cost(b.strip().lstrip("%")) for b in branches.split(","))
        return total

    return cost(entry)


def by_hand(method: str) -> float:
    """FLOPs of a step: per weight and token 2 forward, 2 for the input's gradient and 2 for the weight's, as needed.

    Attention is counted as it is computed: blocks of queries over the keys that they can see.
    """
    s, tokens = c.SIZES, c.BATCH * c.LENGTH
    D, F, V, L = s["hidden_size"], s["intermediate_size"], s["vocab_size"], s["num_hidden_layers"]
    N, K, H = s["num_attention_heads"], s["num_key_value_heads"], s["head_dim"]
    matrices = [(D, N * H), (D, K * H), (D, K * H), (N * H, D), (D, F), (D, F), (F, D)]
    layer = sum(i * o for i, o in matrices)
    adapters = sum((i + o) * c.RANK for i, o in matrices)
    size = max(64, -(-c.LENGTH // 8))
    seen = sum(min(i + size, c.LENGTH) * (min(i + size, c.LENGTH) - i) for i in range(0, c.LENGTH, size)) / c.LENGTH
    attention = 2 * N * H * seen  # scores and their product with the values, multiply-adds a token and layer
    head = D * V
    trained = {"lora": L, "full": L, "freeze": 2}[method]  # layers through which the backward pass goes
    forward = 2 * (L * (layer + attention) + head)
    backward = trained * (2 * layer + 4 * attention) + 2 * head
    if method == "lora":
        forward += 2 * L * adapters
        backward += 4 * L * adapters
    else:
        backward += 2 * trained * layer + (2 * head if method == "full" else 0)
    return tokens * (forward + backward)


def report(folder: Path, method: str) -> None:
    """Print both counts of jaxtune's step."""
    from jaxtune import job as jobs

    job = jobs.prepare(c.config(folder, method))
    got, want = compiled(jobs.compile_step(job).as_text()), by_hand(method)
    print(f"  compiled FLOPs {got / 1e9:.1f} G a step, by hand {want / 1e9:.1f} G: {100 * (got / want - 1):+.1f} %")
