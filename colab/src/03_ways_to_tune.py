# %% [markdown]
# # Frozen, adaptive, LoRA: side by side
#
# There are many ways to tune the same model. They differ in what is allowed to change, and so in memory, in time, in the
# size of the file that comes out, and in how well they learn. Here the same data goes through several of them, with the
# same batches, and we draw the result.

# %% [markdown]
# **Install**, or use what is there; the runtime's own `jax` stays.

# %% [install]

# %% [markdown]
# **What to change.** Add or take out a way in `WAYS`: each is the `tuning` section of a config. Learning rates differ,
# because a way that changes few numbers must change each of them more; these suit the tiny model. For a real one, set
# `MODEL`, divide them by about twenty, and expect minutes instead of seconds for each.

# %% [parameters]
MODEL = "demo"
DATA = "demo"
STEPS = 60
TRAIN = {"batch_size": 16, "compute_dtype": "float32", "remat": "none"} if MODEL == "demo" else {"batch_size": 16}
WAYS = {
    "everything": ({"method": "full"}, 1e-3),
    "last 2 layers": ({"method": "freeze", "last": 2, "train": ["head"]}, 2e-3),
    "LoRA": ({"method": "lora", "rank": 8, "alpha": 16}, 5e-3),
    "AdaLoRA": ({"method": "adalora", "init_rank": 12, "rank": 8, "every": 5}, 5e-3),
    "by gradients": ({"method": "gradient_select", "budget": 0.25, "warmup": 3, "every": 10}, 2e-3),
    "IA³": ({"method": "ia3"}, 3e-2),
}
SCALE = 1.0 if MODEL == "demo" else 0.05  # of the learning rates

# %% [markdown]
# - *Everything*: each weight changes. The most memory, and the whole model is what comes out.
# - *Last 2 layers*: what is below is frozen. The backward pass ends where the frozen layers begin, so it is faster too.
# - *LoRA*: thin matrices beside frozen ones. Small, and rarely much worse than everything.
# - *AdaLoRA* (Zhang et al., 2023): LoRA that moves its ranks to where they matter while training.
# - *By gradients*: only the matrices whose gradients are largest train, chosen anew as training goes on.
# - *IA³* (Liu et al., 2022): one number per channel. Tiny.

# %%
import time

import jax
import matplotlib.pyplot as plt

import jaxtune

runs, seconds = {}, {}
for name, (tuning, learning_rate) in WAYS.items():
    began = time.perf_counter()
    runs[name] = jaxtune.train(
        model=MODEL,
        data={"train": DATA, "validation": 0.1, "max_length": 128},
        tuning=tuning,
        optim={"learning_rate": learning_rate * SCALE, "warmup": 0.1},
        train={**TRAIN, "steps": STEPS, "log_every": 2},
        evaluate={"every": max(STEPS // 6, 2)},
        output=f"runs/ways/{name.replace(' ', '-')}",
    )
    seconds[name] = time.perf_counter() - began

# %% [markdown]
# **The curves.** All saw the same rows in the same order, so the lines may be compared point by point. Look at the end
# (how good), at the slope in the beginning (how fast), and at whether a line turns up again (too high a learning rate).

# %%
figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
for name, run in runs.items():
    held = [(m["step"], m["eval_loss"]) for m in run.metrics if "eval_loss" in m]
    axes.plot(*zip(*held, strict=True), marker="o", markersize=3, label=name)
axes.set(xlabel="step", ylabel="validation loss (nats per token)", yscale="log")
axes.grid(alpha=0.25)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# **What each costs.** Bytes of what comes out stand for how much was learned; seconds include compiling, which for so small
# a model is most of them. On a real model, look at memory first: `%jaxtune plan` tells it before (notebook 4).

# %%
print(f"{'':15} {'loss':>8} {'accuracy':>8} {'bytes out':>11} {'seconds':>8}")
for name, run in runs.items():
    last = [m for m in run.metrics if "eval_loss" in m][-1]
    size = sum(f.stat().st_size for f in (run.folder / "export").glob("*.safetensors"))
    print(f"{name:15} {last['eval_loss']:8.3f} {last['eval_accuracy']:8.3f} {size:11,} {seconds[name]:8.1f}")

# %% [markdown]
# **What an adaptive way chose.** AdaLoRA begins with the same rank everywhere and takes ranks from matrices that use them
# least. The picture shows the rank of each matrix (rows) over the steps; bright ones kept theirs.

# %%
adaptive = next((r for r in runs.values() if (r.folder / "allocation.png").exists()), None)
if adaptive is not None:
    plt.figure(figsize=(8, 6))
    plt.imshow(plt.imread(adaptive.folder / "allocation.png"))
    plt.axis("off")
    plt.show()

# %% [markdown]
# **The answers themselves.** Numbers are one thing; read what each says. The first one may be right by luck, so ask several.

# %%
for name, run in runs.items():
    said = [run.generate(f"What does the {animal} eat?", max_new_tokens=16) for animal in ("heron", "toad")]
    print(f"{name:15} {' | '.join(s.strip() for s in said)}")
print("device:", jax.devices()[0].device_kind)

# %% [markdown]
# **Where to go from here**
#
# - Give each way three learning rates and keep the best: most "X beats Y" is a matter of learning rates. `jaxtune sweep`
#   does it for you.
# - Add `{"method": "lora", "dora": True}`, `{"method": "lora", "init": "pissa"}` or `{"method": "prefix", "tokens": 8}`.
# - Halve the training data. Which way suffers least?
