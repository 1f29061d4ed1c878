"""What a step takes, by rule instead of a compiler: for what is tried first, and where the compiler is missing.

State is exact. Activations are what each remat policy keeps, and one layer's own; hidden states, logits and weights
are counted once each time that they are passed over.

Dimensions: L layers, D embed, N query heads, K key/value heads, H head dim, F mlp, V vocab.
"""

from math import prod
from typing import Any

import jax

from jaxtune.job import Job
from jaxtune.layers import unbox
from jaxtune.planning import compiled, counting
from jaxtune.planning.compiled import Compiled
from jaxtune.planning.reading import Collective, Reading
from jaxtune.sharding import batch_shards

_CHUNK = 3 * 2**26  # logits of a chunk, their gradient, and its probabilities


def by_rule(job: Job) -> Compiled:
    """Peak and reading of a device, estimated."""
    c, d, mesh = job.config, job.blueprint.decoder, job.mesh
    T, A, remat = c.data.max_length, c.train.accumulation, c.train.remat
    s = compiled.state(job)
    count = counting.count(job, T)
    rows = -(-c.train.batch_size // A // batch_shards(mesh))
    here = rows * T / mesh.shape["context"]  # tokens of a micro-batch on a device
    split = mesh.shape["tensor"]
    heads = (d.heads + 2 * d.kv_heads) * d.head / split
    mlp = d.mlp * (d.top_k or 1) / split
    narrow = {"full": d.embed, "offload": d.embed, "dots": 3 * d.embed + heads + 2 * mlp}
    kept = narrow.get(remat, 8 * d.embed + 3 * heads + 5 * mlp) * 2.0 * d.layers * here / mesh.shape["stage"]
    offloaded = kept if remat == "offload" else 0.0
    layer = here * 2.0 * (8 * d.embed + 3 * heads + 5 * mlp)
    plain = _bytes(job) / d.layers
    gathers = mesh.shape["fsdp"] * mesh.shape["context"] * mesh.shape["expert"]
    weights = plain / split / mesh.shape["expert"]  # of a layer, whole
    temporaries = kept - offloaded + layer + s.trained + _CHUNK + 2 * weights * (gathers > 1)
    again = remat in ("full", "offload")
    forward = count.forward + count.attention / 3
    tokens = here * A / split / mesh.shape["stage"]
    work = tokens * (count.total + forward * again + count.attention / 3 * (remat == "dots"))
    passes = (2 + again) * A
    moved = (
        passes * weights * d.layers
        + 5.0 * (s.trained + s.optimiser)
        + A * here * d.layers * 2.0 * ((24 + 8 * again) * d.embed + (6 + 3 * again) * (mlp + heads))
        + 8.0 * A * here * d.rows / split
    )
    if getattr(c.tuning, "base", None):  # the matrices are made from codes in each pass: written and read
        moved += passes * 4.0 * _numbers(job.blueprint.plain) / split
    sent = []
    axes = tuple(a for a in ("fsdp", "expert", "context") if mesh.shape[a] > 1)
    if gathers > 1:
        sent.append(Collective("all-gather", axes, gathers, weights * d.layers, passes, "weights"))
        sent.append(Collective("reduce-scatter", axes, gathers, float(s.trained * gathers), A, "gradients"))
    if mesh.shape["data"] > 1:
        sent.append(Collective("all-reduce", ("data",), mesh.shape["data"], float(s.trained), 1, "gradients"))
    if split > 1:
        whole = here * d.embed * 2.0
        sent.append(Collective("all-reduce", ("tensor",), split, whole, (4 + 2 * again) * d.layers * A, "activations"))
    r = Reading({"bf16": work}, moved, sent, {}, 0.0, 0.0, kept, offloaded, [])
    return Compiled(s.total + temporaries, True, None, temporaries, r)


def _bytes(job: Job) -> float:
    """Of all layers' weights in the dtype that they are multiplied in, or held in where that is less."""
    return float(sum(prod(x.shape) * min(x.dtype.itemsize, 2) for x in _of_layers(job.blueprint.weights)))


def _numbers(weights: Any) -> int:
    return sum(prod(x.shape) for x in _of_layers(weights))


def _of_layers(weights: Any) -> list[Any]:
    return jax.tree.leaves([unbox(tree) for name, tree in weights.items() if name.startswith("layers_")])
