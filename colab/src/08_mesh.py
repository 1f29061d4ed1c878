# %% [markdown]
# # Eight devices, without eight devices
#
# One chip is soon too small, and then weights and batches are split over several. JAX can pretend that a CPU is eight
# devices, so what happens on a TPU v5e-8 can be seen, measured and understood on a laptop. The losses are the same on
# any mesh, and this notebook checks that too.

# %% [markdown]
# **Install**, or use what is there. This notebook is about virtual devices on the CPU, on any runtime.

# %% [install]

# %% [markdown]
# **Eight devices have to be asked for before JAX is first used**, so this cell comes first; if JAX is running already,
# restart the kernel. The strategies are named in the config under `mesh`.

# %% [parameters]
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
DATA = "demo"
STEPS, ROWS = 20, 16  # rows of a batch
STRATEGIES = {
    "fsdp": {"strategy": "fsdp"},
    "fsdp and tensor": {"strategy": "fsdp_tensor", "tensor": 2},
    "replicated": {"strategy": "replicated"},
}

# %% [markdown]
# **A mesh is an array of devices with named axes.** `fsdp` splits the batch and the weights; `tensor` splits heads and the
# MLP; axes of size one do nothing. A strategy is a name for some sizes.

# %%
import jax

from jaxtune import config, sharding

assert jax.device_count() == 8, "restart the kernel: JAX was in use before this notebook asked for eight devices"
meshes = {name: sharding.make_mesh(config.Mesh(**keys)) for name, keys in STRATEGIES.items()}
for name, mesh in meshes.items():
    print(f"{name:16}", {axis: n for axis, n in mesh.shape.items() if n > 1})

# %% [markdown]
# **Where a weight lies.** The same matrix (128 × 384, an MLP's) under each strategy. Each colour is one device and holds
# that block only. Under *fsdp* each has an eighth, and gathers the rest for the moment of multiplying; with *tensor* the
# columns are split too, each device computes its own columns, and the results are added up; *replicated* has it all, eight
# times.

# %%
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune.job import prepare
from jaxtune.weights import path_name


def job_of(mesh):
    """A run before its weights are read: shapes, and where each lies."""
    keys = {"mesh": mesh, "data": {"train": DATA, "max_length": 128}, "train": {"batch_size": ROWS, "steps": STEPS}}
    return prepare(config.load(None, config.nested({**keys, "tuning": {"method": "full"}})))


for name, keys in STRATEGIES.items():
    trainable = job_of(keys).state.trainable
    found = {path_name(p): s for p, s in jax.tree.leaves_with_path(trainable)}
    path, leaf = next((p, s) for p, s in found.items() if "up_proj" in p)
    spec = PartitionSpec(*leaf.sharding.spec[leaf.ndim - 2 :]) if leaf.sharding.spec else PartitionSpec()
    shown = jax.device_put(jnp.zeros(leaf.shape[-2:]), NamedSharding(meshes[name], spec))
    print(f"{name}: {path} {leaf.shape} is split as {leaf.sharding.spec}")
    jax.debug.visualize_array_sharding(shown)

# %% [markdown]
# **What a device has to hold.** Summed over weights and optimiser: splitting is what makes a big model fit. *Replicated* is
# fastest where everything fits anyway, because nothing has to be gathered.

# %%
import math

import matplotlib.pyplot as plt

held = {}
for name, keys in STRATEGIES.items():
    state = job_of(keys).state
    leaves = [x for x in jax.tree.leaves((state.trainable, state.optimiser)) if hasattr(x, "sharding")]
    held[name] = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves) / 2**20
plt.figure(figsize=(6, 2.5), layout="constrained")
plt.barh(list(held), list(held.values()))
plt.xlabel("MiB per device: weights and optimiser")
plt.show()

# %% [markdown]
# **The same losses.** Each strategy trains with the same rows; the curves lie on one another, to a few units in the fifth
# digit (sums are made in another order). So a mesh is a matter of speed and memory, never of results.

# %%
import jaxtune

losses = {}
for name, keys in STRATEGIES.items():
    run = jaxtune.train(
        model="demo",
        data={"train": DATA, "max_length": 128},
        tuning={"method": "full"},
        optim={"learning_rate": 1e-3},
        train={"steps": STEPS, "batch_size": ROWS, "compute_dtype": "float32", "remat": "none", "log_every": 1},
        mesh=keys,
        output=f"runs/mesh/{name.replace(' ', '-')}",
    )
    losses[name] = [m["loss"] for m in run.metrics if "loss" in m]
for name, values in losses.items():
    plt.plot(values, label=name, linewidth=6 - 2 * len(plt.gca().lines))
plt.legend(frameon=False)
plt.xlabel("step")
plt.ylabel("loss")
plt.show()
first, *others = losses.values()
print("largest difference:", max(abs(a - b) / a for other in others for a, b in zip(first, other, strict=True)))

# %% [markdown]
# **Where to go from here**
#
# - Add `"context": {"strategy": "context"}`, which splits long rows along their length, or `"stage": {"strategy": "stage",
#   "stage": 2}`, a pipeline.
# - `!jaxtune plan my.yaml --topology v5e-8 --topology v6e-8` compiles for real TPUs and counts what goes over their network.
# - On several machines the same command runs on each; they find each other (see "Several hosts" in the guide).
