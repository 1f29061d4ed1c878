# %% [markdown]
# # QLoRA on one chip, planned beforehand
#
# QLoRA (Dettmers et al., 2023) holds the frozen base in four bits and trains LoRA over it: an 8B model then takes
# about 5 GB instead of 16. Whether that fits *your* chip with *your* batch is not a matter of luck: `plan` compiles the
# very step that `train` runs, for a machine that need not be here, and says what it takes.

# %% [markdown]
# **Install**, or use what is there; the runtime's own `jax` stays. `plan` compiles for TPUs where `libtpu` is installed,
# which it is on TPU runtimes; elsewhere the state's bytes are exact and the rest goes by rule, and it says so.

# %% [install]

# %% [markdown]
# **What to change.** `PLANNED` names a model's size; `%jaxtune presets` lists them. No weights are needed to plan.
# `MODEL` is what we then tune here: the tiny one, or on a chip that has room for it the real one.

# %% [parameters]
PLANNED = "llama3.1-8b"
CHIPS = ["v5e-1", "v6e-1"]  # Colab's: 16 and 32 GB
HOW = "fast"  # compile a few layers; "full" compiles all, "rule" none
MODEL = "demo"
DATA = "demo"
STEPS = 60
LEARNING_RATE = 5e-3 if MODEL == "demo" else 2e-4
TRAIN = {"batch_size": 16, "compute_dtype": "float32", "remat": "none"} if MODEL == "demo" else {"batch_size": 16}

# %% [markdown]
# **A recipe as a starting point.** Recipes come with the package; `cp` makes one your own. Its first lines say what to run,
# on what, and what to expect.

# %%
import pathlib

pathlib.Path("llama3-8b-qlora.yaml").unlink(missing_ok=True)
# %jaxtune recipes cp llama3-8b-qlora
print(pathlib.Path("llama3-8b-qlora.yaml").read_text())

# %% [markdown]
# **Does it fit?** First LoRA over the base in bfloat16, then the same over four bits. `plan` runs as a process of its own
# (`!`), before this one takes the chip. Look at *memory*: the base's bytes fall to a quarter, the rest stays.

# %%

on = " ".join(f"--topology {chip}" for chip in CHIPS)
own = "data.max_length=1024 train.batch_size=8 train.accumulation=8"
# !{sys.executable} -m jaxtune plan llama3-8b-qlora.yaml model={PLANNED} tuning.method=lora {on} --how {HOW} {own}
# !{sys.executable} -m jaxtune plan llama3-8b-qlora.yaml model={PLANNED} {on} --how {HOW} {own}

# %% [markdown]
# **What four bits do to a weight.** NF4 has sixteen values, placed where a normal distribution has its mass, and a scale for
# each block of 64 weights. Here is a matrix of weights before and after: the steps are what is lost. Below it the same
# number of bits spent evenly (int4) loses more, because most weights are small.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from jaxtune.nodes.quantized import quantize
from jaxtune.weights import densify

w = jax.random.normal(jax.random.key(0), (64, 256)) * 0.02
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
for ax, kind in zip(axes, ("nf4", "int4"), strict=True):
    back = densify(quantize(w, -2, kind, 64))
    error = float(jnp.sqrt(jnp.mean((back - w) ** 2)) / jnp.std(w))
    ax.plot(w.ravel()[:2000], back.ravel()[:2000], ".", markersize=2)
    ax.set(title=f"{kind}: error {100 * error:.1f} % of the spread", xlabel="weight before", ylabel="weight after")
plt.show()

# %% [markdown]
# **Tune.** `method: qlora` is LoRA with `base: nf4`; the base is quantised layer by layer as it is read, so it is never there
# in full. Everything else is as always. The adapters correct a part of what quantising lost, too.

# %%
import jaxtune

run = jaxtune.train(
    model=MODEL,
    data={"train": DATA, "validation": 0.1, "max_length": 128},
    tuning={"method": "qlora", "rank": 8, "alpha": 16},
    optim={"learning_rate": LEARNING_RATE, "warmup": 0.1},
    train={**TRAIN, "steps": STEPS},
    evaluate={"every": 20},
    output="runs/qlora",
)
run.generate("What does the heron eat?", max_new_tokens=16)

# %% [markdown]
# **Where to go from here**
#
# - `!jaxtune plan my.yaml --topology v5e-1 --search` tries batches, rematerialisation and bases, and prints the fastest that
#   fits as YAML.
# - `tuning.base: int8` costs twice the bytes and loses nearly nothing; `fp8` likewise on chips that have it.
# - Merging lays the adapter onto the base as it is in the folder, not onto its quantised form: `%jaxtune merge runs/qlora out`.
# - Does LoRA without quantising learn better here? Change `method` and compare the curves.
