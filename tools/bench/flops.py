"""Matrix-product FLOPs of the compiled step, read from its optimised HLO, beside the count by hand."""

from pathlib import Path

from jaxtune.planning import reading
from tools.bench import contenders as c


def compiled(text: str) -> float:
    """FLOPs of all matrix products in optimised HLO, those of loops times their trips."""
    found = reading.read(text, {"data": 1})
    if found.unknown_loops:
        raise ValueError(f"a loop of unknown length: {found.unknown_loops[0]}")
    return sum(found.flops.values())


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
    from jaxtune import steps

    job = jobs.prepare(c.config(folder, method))
    got, want = compiled(steps.compile_step(job).as_text()), by_hand(method)
    print(f"  compiled FLOPs {got / 1e9:.1f} G a step, by hand {want / 1e9:.1f} G: {100 * (got / want - 1):+.1f} %")
