"""Bytes that each way to tune takes on one device, by the code that trains, from shapes alone.

    python -m tools.bench.memory                      # 7B, 8B and 70B models, one row of 2048 tokens

Weights, gradients and optimiser state are those of the training state. Activations are what the backward pass keeps of
the forward pass (each layer's input, with rematerialisation of whole layers), then one layer's own while it is computed
again, and a chunk of logits. What a compiler adds in temporaries and padding is not in it; GB are 10⁹ bytes.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune import blueprint, config, overview, tuning
from jaxtune import job as jobs
from jaxtune.models import families
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.presets import PRESETS
from jaxtune.objectives import OBJECTIVES
from jaxtune.objectives.base import LOGITS_BYTES
from jaxtune.tuning.method import Training, join, split

MODELS = ("llama2-7b", "llama3.1-8b", "llama2-70b", "llama3.1-70b")

# name -> overrides, and the row of LLaMA-Factory's published estimates (its README, 7B and 70B, GB) that it stands by
BF16 = {"train.param_dtype": "bfloat16"}
ROWS: dict[str, tuple[dict[str, Any], tuple[int, int] | None]] = {
    "full, float32": ({"tuning.method": "full"}, (120, 1200)),
    "full, bfloat16": ({"tuning.method": "full", **BF16}, (60, 600)),
    "full, bfloat16, adamw8bit": ({"tuning.method": "full", "optim.name": "adamw8bit", **BF16}, (60, 600)),
    "galore r=128, bfloat16": ({"tuning.method": "galore", **BF16}, (16, 160)),
    "lisa, 2 layers": ({"tuning.method": "lisa"}, (16, 160)),
    "gradient_select 5 %": ({"tuning.method": "gradient_select", "tuning.budget": 0.05}, (16, 160)),
    "freeze, last 2": ({"tuning.method": "freeze", "tuning.last": 2}, (16, 160)),
    "freeze, last 1, bfloat16": ({"tuning.method": "freeze", "tuning.last": 1, **BF16}, (16, 160)),
    "lora r=8": ({"tuning.method": "lora"}, (16, 160)),
    "dora r=8": ({"tuning.method": "lora", "tuning.dora": True}, (16, 160)),
    "adalora 12 to 8": ({"tuning.method": "adalora"}, (16, 160)),
    "ia3": ({"tuning.method": "ia3"}, (16, 160)),
    "lora r=8, int8": ({"tuning.method": "lora", "tuning.base": "int8"}, (10, 80)),
    "qlora r=8, nf4": ({"tuning.method": "qlora"}, (6, 48)),
}


class Bytes(NamedTuple):
    """Of one device that holds all."""

    weights: int
    gradients: int
    optimiser: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


def count(decoder: DecoderConfig, c: config.Config, rows: int, length: int) -> Bytes:
    """What a step of this config on this model takes."""
    training = Training(1000, c.optim)
    s = blueprint.sketch(
        decoder, lambda d: tuning.make(c.tuning, d, training), c.train.compute_dtype, c.train.remat, c.train.param_dtype
    )
    tx = jobs.optimiser(c, s.method, s.weights, s.labels, 1000)
    abstract = jax.tree.map(lambda w: w.value, s.weights, is_leaf=lambda x: hasattr(x, "names"))
    trainable, frozen = split(abstract, s.labels)
    state = jax.eval_shape(tx.init, trainable)
    weights, gradients, optimiser = (overview.held(t) for t in (abstract, trainable, state))
    kept = rows * grown(lambda b: kept_bytes(s.decoder, trainable, frozen, b, length))
    return Bytes(weights, gradients, optimiser, kept + one_layer(decoder, c, rows, length) + LOGITS_BYTES["tpu"])


def grown(bytes_of: Callable[[int], int]) -> int:
    """What one row more takes: weights that the backward pass needs too are not counted so."""
    return bytes_of(2) - bytes_of(1)


def kept_bytes(decoder: DecoderConfig, trainable: Any, frozen: Any, rows: int, length: int) -> int:
    """All that the backward pass gets from the forward pass."""
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = dict.fromkeys(("ids_BT", "segment_BT", "position_BT", "loss_mask_BT"), ids)

    def pullback(trainable: Any, frozen: Any, batch: Any) -> Any:
        def loss(t: Any) -> Any:
            columns = batch["ids_BT"], batch["segment_BT"], batch["position_BT"]
            outputs = Decoder(decoder).apply({"params": join(t, frozen)}, *columns)[0]
            return OBJECTIVES["sft"](outputs, batch)[0]

        return jax.vjp(loss, trainable)[1]

    return overview.held(jax.eval_shape(pullback, trainable, frozen, batch))


def one_layer(decoder: DecoderConfig, c: config.Config, rows: int, length: int) -> int:
    """What one layer keeps while its backward pass runs: two layers' less one's, without rematerialisation."""
    if c.train.remat == "none":
        return 0

    def of(layers: int) -> int:
        ropes, windows = decoder.rope_of[:layers], decoder.windows[:layers]
        small = dataclasses.replace(decoder, layers=layers, rope_of=ropes, windows=windows)
        tuned = (
            c.tuning.model_copy(update={"last": min(2, layers)}) if isinstance(c.tuning, config.Freeze) else c.tuning
        )
        if isinstance(tuned, config.Lisa):
            tuned = tuned.model_copy(update={"layers": 1})
        if isinstance(tuned, config.GradientSelect):
            tuned = tuned.model_copy(update={"budget": 1.0})
        s = blueprint.sketch(
            small,
            lambda d: tuning.make(tuned, d, Training(1000, c.optim)),
            c.train.compute_dtype,
            "none",
            c.train.param_dtype,
        )
        abstract = jax.tree.map(lambda w: w.value, s.weights, is_leaf=lambda x: hasattr(x, "names"))
        return grown(lambda b: kept_bytes(s.decoder, *split(abstract, s.labels), b, length))

    return rows * (of(2) - of(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    print(f"{args.rows} × {args.length} tokens, bfloat16 activations, remat full; GB of 10⁹ bytes")
    for model in args.models:
        decoder = families.from_hf(PRESETS[model], model)
        print(
            f"\n{model:26} {'weights':>8} {'gradients':>9} {'optimiser':>9} {'activations':>11} {'total':>7}  published"
        )
        for name, (given, published) in ROWS.items():
            if args.only and not any(name.startswith(o) for o in args.only):
                continue
            b = count(decoder, config.load(None, config.nested(given)), args.rows, args.length)
            gb = [x / 1e9 for x in (*b, b.total)]
            theirs = "" if published is None else f"{published['70b' in model]:>8}"
            print(f"{name:26} {gb[0]:8.2f} {gb[1]:9.2f} {gb[2]:9.2f} {gb[3]:11.2f} {gb[4]:7.2f}  {theirs}", flush=True)


if __name__ == "__main__":
    main()
