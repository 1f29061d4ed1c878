"""The same training step by three hands: jaxtune, a plain JAX step, and transformers + peft.

Each gives a function that takes one optimiser step and returns the loss. B rows, T time, D embed, F mlp, V vocab.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH, LENGTH = 4, 512
RANK, ALPHA = 8, 16.0
SIZES = {
    "vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 1376, "head_dim": 64,
}  # fmt: skip


def write_inputs(folder: Path) -> None:
    """A model folder of the bench's shape, and texts to train on."""
    from jaxtune.layers import Rope
    from jaxtune.models.decoder import DecoderConfig
    from tools.make_demo_model import DEMO, write_random_model

    c = DecoderConfig(
        vocab=SIZES["vocab_size"], embed=SIZES["hidden_size"], layers=SIZES["num_hidden_layers"],
        heads=SIZES["num_attention_heads"], kv_heads=SIZES["num_key_value_heads"], head=SIZES["head_dim"],
        mlp=SIZES["intermediate_size"], ropes=(Rope(SIZES["head_dim"], context=2048),),
    )  # fmt: skip
    write_random_model(folder / "model", c, seed=0)
    for f in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / f).write_bytes((DEMO / "model" / f).read_bytes())
    rng = np.random.default_rng(0)
    words = [chr(97 + i) + chr(97 + j) for i in range(26) for j in range(26)]
    texts = [" ".join(rng.choice(words, 600)) for _ in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


def config(folder: Path, method: str, **more: Any) -> Any:
    """The config of a run on these inputs."""
    from jaxtune import config

    methods: dict[str, dict[str, Any]] = {
        "lora": {"method": "lora", "rank": RANK, "alpha": ALPHA},
        "full": {"method": "full"},
        "freeze": {"method": "freeze", "last": 2},
    }
    given = {
        "model": folder / "model", "data.train": folder / "texts.jsonl", "data.max_length": LENGTH,
        "objective": "pretrain",
        "tuning": methods[method], "output": folder / f"run-{method}", "train.batch_size": BATCH, "train.steps": 1000,
        "train.compute_dtype": "float32", "train.remat": "none", "optim.schedule": "constant", "optim.warmup": 0,
    }  # fmt: skip
    return config.load(None, config.nested({**given, **more}))


def jaxtune(folder: Path, method: str) -> Callable[[], float]:
    """The very step that `jaxtune train` runs."""
    import jax

    from jaxtune import job as jobs
    from jaxtune import steps

    job = jobs.prepare(config(folder, method))
    with jax.set_mesh(job.mesh):
        compiled = steps.compile_step(job)
    take = stepper(job, compiled)

    def one() -> float:
        return take()[0]

    return one


def stepper(job: Any, compiled: Any) -> Callable[[], tuple[float, float]]:
    """A function that takes the job's next step, from its start, and returns loss and seconds."""
    import time

    import jax
    import jax.numpy as jnp

    from jaxtune import blueprint, steps
    from jaxtune.data.pipeline import Batches
    from jaxtune.layers import unbox
    from jaxtune.training import State
    from jaxtune.tuning.method import split

    c = job.config.train
    with jax.set_mesh(job.mesh):
        trainable, frozen = split(unbox(blueprint.materialise(job.blueprint, jax.random.key(0))), job.blueprint.labels)
        key = jax.random.key_data(jax.random.key(0))
        state = jax.device_put(
            State(trainable, frozen, jax.jit(job.tx.init)(trainable), jnp.int32(0), key),
            jax.tree.map(lambda s: s.sharding, job.state),
        )
    batches = Batches(job.data.train, c.batch_size, seed=0, row_count=None)
    put = steps.putter(job.mesh, c.accumulation)

    def take() -> tuple[float, float]:
        nonlocal state
        with jax.set_mesh(job.mesh):
            batch = put(next(batches))
            began = time.perf_counter()
            state, report = compiled(state, batch)
            loss = float(report["loss"])
        return loss, time.perf_counter() - began

    return take


def plain_jax(folder: Path, method: str) -> Callable[[], float]:
    """A LLaMA step as one would write it in an afternoon: einsums on [B, T, D], full logits, one jit."""
    import jax
    import jax.numpy as jnp
    import optax
    import safetensors.numpy

    raw = safetensors.numpy.load_file(folder / "model" / "model.safetensors")
    w = {k: jnp.asarray(v) for k, v in raw.items()}
    N, K, H = SIZES["num_attention_heads"], SIZES["num_key_value_heads"], SIZES["head_dim"]
    linears = [k for k in w if "proj" in k]
    rng = np.random.default_rng(0)
    trained = dict(w)
    if method == "lora":
        trained = {f"{k}.A": jnp.asarray(rng.normal(0, 0.02, (RANK, w[k].shape[1])), jnp.float32) for k in linears}
        trained |= {f"{k}.B": jnp.zeros((w[k].shape[0], RANK)) for k in linears}

    def forward(t: dict, w: dict, ids_BT: Any) -> Any:
        p = {**w, **t}

        def linear(x: Any, name: str) -> Any:
            y = jnp.einsum("btd,od->bto", x, p[name])
            if f"{name}.A" in p:
                y = y + ALPHA / RANK * ((x @ p[f"{name}.A"].T) @ p[f"{name}.B"].T)
            return y

        def norm(x: Any, scale: Any) -> Any:
            return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale

        T = ids_BT.shape[1]
        freq = 10000.0 ** (-jnp.arange(H // 2) / (H // 2))
        angle = jnp.arange(T)[:, None] * freq
        cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]

        def rope(x: Any) -> Any:
            a, b = jnp.split(x, 2, -1)
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

        x = p["model.embed_tokens.weight"][ids_BT]
        for i in range(SIZES["num_hidden_layers"]):
            n = f"model.layers.{i}."
            h = norm(x, p[n + "input_layernorm.weight"])
            q, k, v = (linear(h, f"{n}self_attn.{c}_proj.weight").reshape(*ids_BT.shape, -1, H) for c in "qkv")
            q, k, v = rope(q), jnp.repeat(rope(k), N // K, 2), jnp.repeat(v, N // K, 2)
            s = jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
            s = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, T), bool)), s, -1e30), -1)
            o = jnp.einsum("bnts,bsnh->btnh", s, v).reshape(*ids_BT.shape, -1)
            x = x + linear(o, f"{n}self_attn.o_proj.weight")
            h = norm(x, p[n + "post_attention_layernorm.weight"])
            gate = jax.nn.silu(linear(h, f"{n}mlp.gate_proj.weight")) * linear(h, f"{n}mlp.up_proj.weight")
            x = x + linear(gate, f"{n}mlp.down_proj.weight")
        return norm(x, p["model.norm.weight"]) @ p["lm_head.weight"].T

    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, weight_decay=0.0))

    def loss(t: dict, w: dict, ids_BT: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(forward(t, w, ids_BT)[:, :-1], ids_BT[:, 1:]).mean()

    @jax.jit
    def step(t: dict, s: Any, w: dict, ids_BT: Any) -> Any:
        value, g = jax.value_and_grad(loss)(t, w, ids_BT)
        updates, s = tx.update(g, s, t)
        return optax.apply_updates(t, updates), s, value

    state = trained, tx.init(trained)

    def one() -> float:
        nonlocal state
        ids = jnp.asarray(rng.integers(3, 500, (BATCH, LENGTH)))
        t, s, value = step(*state, w, ids)
        state = t, s
        return float(value)

    return one


def transformers_peft(folder: Path, method: str) -> Callable[[], float]:
    """A plain loop with transformers' model (SDPA attention), peft's adapters and torch's AdamW."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    model: Any = transformers.LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    if method == "lora":
        import peft

        model = peft.get_peft_model(
            model, peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM")
        )
    elif method == "freeze":
        for n, p in model.named_parameters():
            p.requires_grad = "layers.4." in n or "layers.5." in n
    model.train()
    trains = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trains, lr=1e-4, weight_decay=0.0)
    rng = np.random.default_rng(0)

    def one() -> float:
        ids = torch.tensor(rng.integers(3, 500, (BATCH, LENGTH)))
        loss = model(input_ids=ids, labels=ids).loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trains, 1.0)
        adam.step()
        return float(loss.detach())

    return one


CONTENDERS = {"jaxtune": jaxtune, "plain JAX": plain_jax, "transformers+peft": transformers_peft}
