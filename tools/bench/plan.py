"""Tables of what published models take on TPUs, by their own compiler: `python -m tools.bench.plan [NAME] [LENGTH] …`.

NAME is one of those in `RUNS`, LENGTH a length of rows; all of them where none is given. Each step takes minutes to
compile; what was compiled before is remembered. The lines are those of a table in Markdown.
"""

import os
import sys

from jaxtune import config, log
from jaxtune.errors import UserError

LORA = ["tuning.method=lora", "tuning.rank=16", "tuning.targets=all-linear"]
FULL = ["tuning.method=full", "train.param_dtype=bfloat16"]  # with fp32 AdamW, 8B alone are 12 GB on each of 8 chips
RUNS: dict[str, tuple[str, list[str]]] = {
    "lora": ("llama3.1-8b", LORA),
    "full": ("llama3.1-8b", ["tuning.method=full"]),
    "full-bf16": ("llama3.1-8b", FULL),
    "nf4": ("llama3.1-8b", [*LORA, "tuning.base=nf4"]),
    "int8": ("llama3.1-8b", [*LORA, "tuning.base=int8"]),
    "70b-lora": ("llama3.1-70b", LORA),
}
MACHINES = ("v6e:2x4", "v5e:2x4", "v5p:2x2x1")
TOKENS = 8192  # of a micro-batch on a chip


def main(arguments: list[str]) -> None:
    """Print a row for each run, length and machine that is asked for."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jaxtune import planning
    from jaxtune.planning import topology

    numbers = [int(a) for a in arguments if a.isdigit()] or [8192, 2048]
    machines = [a for a in arguments if ":" in a]
    more = [a for a in arguments if "=" in a]
    names = [a for a in arguments if a in RUNS] or list(RUNS)
    log.say("| run | machine | rows × length | remat | peak | limit | GFLOPs/token | sent a chip | arithmetic, memory, "
            "network s | tokens/s/chip | MFU |")  # fmt: skip
    log.say("|-|-|-|-|-|-|-|-|-|-|-|")
    for length in numbers:
        for name in names:
            model, keys = RUNS[name]
            for machine in machines or (["v5p:4x4x4"] if name == "70b-lora" else MACHINES):
                chips = topology.parse(machine).devices
                rows = max(TOKENS // length, 1) * chips
                given = [f"model={model}", f"data.max_length={length}", f"train.batch_size={rows}", *keys, *more]
                c = config.load(None, config.parse_overrides(given))
                try:
                    r = planning.plan(c, [machine])[0].to_dict()
                except UserError as e:
                    log.say(f"| {name} | {machine} | {rows} × {length} | {e} |")
                    continue
                sent = sum(x["bytes"] for x in r["collectives"])
                s, memory = r["seconds"] or {}, r["memory"]
                log.say(
                    f"| {name} | {machine} | {rows} × {length} | {c.train.remat} | {log.size(memory['peak'])} | "
                    f"{log.size(memory['limit'])} | {r['flops_per_token']['total'] / 1e9:.1f} | {log.size(sent)} | "
                    + " ".join(f"{s[k]:.2f}" for k in ("arithmetic", "memory", "network") if s)
                    + (f" | {r['tokens_per_second_per_chip']:,.0f} | {100 * r['mfu']:.0f} % |" if s else " | – | – |")
                )


if __name__ == "__main__":
    main(sys.argv[1:])
