# %% [markdown]
# # Smaller: fewer layers, a teacher, fewer bits, a file for Ollama
#
# A model that answers well is often larger than it has to be. Here we tune one, take half of its layers out, let the
# whole one teach the half (distillation), and write the result in four bits and as GGUF, which llama.cpp and
# Ollama open. At each step we measure what it cost.

# %% [markdown]
# **Install**, or use what is there, with what writes GGUF; the runtime's own `jax` stays.

# %% [install] gguf

# %% [markdown]
# **What to change.** With a real model choose less to take out (a quarter of the layers) and train the student on much text.

# %% [parameters]
MODEL = "demo"
DATA = "demo"
STEPS = 100
LEARNING_RATE = 2e-3 if MODEL == "demo" else 2e-5
TRAIN = {"batch_size": 16, "compute_dtype": "float32", "remat": "none"} if MODEL == "demo" else {"batch_size": 16}

# %% [markdown]
# **The teacher**: the model tuned as a whole on the data. Its validation loss is what the small one should come near to.

# %%
import json
import pathlib
import shutil

import matplotlib.pyplot as plt

import jaxtune

same = {
    "data": {"train": DATA, "validation": 0.1, "max_length": 128},
    "tuning": {"method": "full"},
    "optim": {"learning_rate": LEARNING_RATE, "warmup": 0.1},
    "train": {**TRAIN, "steps": STEPS},
    "evaluate": {"every": max(STEPS // 5, 2)},
}
teacher = jaxtune.train(model=MODEL, output="runs/teacher", **same)

# %% [markdown]
# **Half of the layers go.** `prune --method layers` looks at how much each layer changes what flows through it, and takes out
# those that change it least. What it writes is an ordinary model of fewer layers, worse than before: it has to learn again.

# %%
CALIBRATE = DATA if DATA != "demo" else pathlib.Path(jaxtune.__file__).parent / "demo" / "train.jsonl"
shutil.rmtree("student", ignore_errors=True)
# %jaxtune prune {teacher.folder} student --method layers --sparsity 0.5 --data {CALIBRATE} --samples 16 --length 128

# %% [markdown]
# **Learn again, twice**: once from the data alone, and once from the data and the teacher. The teacher says more than which
# word is right: it says how likely all the others are. Same steps, same rows, so the two curves may be compared.

# %%
teach = {"teacher": str(teacher.folder / "export"), "weight": 0.7, "temperature": 2.0}
alone = jaxtune.train(model="student", output="runs/alone", **same)
taught = jaxtune.train(model="student", distill=teach, output="runs/taught", **same)

# %% [markdown]
# **Who wins?** The dashed line is the teacher's loss. On this small task, which the half can learn whole, the difference is
# small; it grows with the distance between teacher and student, and with how little data there is.


# %%
def held(run):
    """Validation loss over steps."""
    return [(m["step"], m["eval_loss"]) for m in run.metrics if "eval_loss" in m]


plt.figure(figsize=(7, 4), layout="constrained")
for name, run in {"the half, data alone": alone, "the half, with its teacher": taught}.items():
    plt.plot(*zip(*held(run), strict=True), marker="o", label=name)
plt.axhline(held(teacher)[-1][1], linestyle="--", color="grey", label="the whole")
plt.yscale("log")
plt.xlabel("step")
plt.ylabel("validation loss")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# **Fewer bits.** GPTQ (Frantar et al., 2022) rounds weights one after the other and lets those that are still free make up for
# the error, on a few rows of data. The table is what it cost, over the whole rows: questions too, which tuning on answers has
# not trained, so look at the difference, not at the height.

# %%
shutil.rmtree("int4", ignore_errors=True)
# %jaxtune quantize {taught.folder} int4 --method gptq --dtype int4 --group 32 --data {CALIBRATE} --samples 16 --length 128 --no-speed

# %% [markdown]
# **GGUF** is one file with everything in it. Beside it lies a `Modelfile` with the chat template, so that
# `ollama create animals -f gguf/Modelfile` is all that is left to do.

# %%
shutil.rmtree("gguf", ignore_errors=True)
# %jaxtune quantize {taught.folder} gguf --format gguf --dtype q8_0 --no-speed
print((pathlib.Path("gguf") / "Modelfile").read_text())

# %% [markdown]
# **Sizes, and answers.** The last column is what counts: does it still know what the heron eats?


# %%
def size(folder, pattern="*.safetensors"):
    """Bytes of weights."""
    return sum(f.stat().st_size for f in pathlib.Path(folder).glob(pattern))


question = "What does the heron eat?"
for name, folder in {
    "whole": teacher.folder / "export",
    "half": taught.folder / "export",
    "half, int4": "int4",
}.items():
    answer = jaxtune.load(folder).answer(question, max_new_tokens=12).strip()
    print(f"{name:12} {size(folder):>10,} bytes  {answer}")
print(f"{'half, gguf':12} {size('gguf', '*.gguf'):>10,} bytes")
print(json.dumps(json.loads((pathlib.Path("int4") / "quantize.json").read_text()), indent=1)[:600])

# %% [markdown]
# **Where to go from here**
#
# - `distill={"teacher": …, "on_policy": 0.5}`: the student's own answers, corrected by the teacher.
# - `%jaxtune prune runs/teacher sweep --sweep 0.1,0.3,0.5 --method magnitude,wanda --data …` draws loss against sparsity.
# - Q4_K instead of Q8_0 halves the file; a model this small feels it, a large one hardly.
