# %% [markdown]
# # To Hugging Face and back
#
# A tuned model is worth what others can do with it. jaxtune reads and writes Hugging Face's format: safetensors with the
# names that everyone knows. In this notebook a model goes in, comes out three ways (adapter, whole, cache), and we
# check that nothing was lost on the way, bit by bit.

# %% [markdown]
# **Install**, or use what is there; the runtime's own `jax` stays. `transformers` and `torch` are on Colab already; without
# `torch` the check against it is left out, and the cell says so.

# %% [install]

# %% [markdown]
# **What to change.** `MODEL` may be a hub id, a folder, or a folder of llama2.c's or Meta's own files.

# %% [parameters]
MODEL = "demo"
DATA = "demo"
STEPS = 60
LEARNING_RATE = 5e-3 if MODEL == "demo" else 2e-4
TRAIN = {"batch_size": 16, "compute_dtype": "float32", "remat": "none"} if MODEL == "demo" else {"batch_size": 16}

# %% [markdown]
# **What a model folder is.** `config.json` says the shape, `*.safetensors` holds the tensors, the tokenizer's files turn text
# into numbers. Here are the largest tensors; the names are the ones that LoRA targets and freezing rules go by.

# %%
import json
import pathlib
import shutil

import matplotlib.pyplot as plt
import numpy as np
from safetensors.numpy import load_file

import jaxtune
from jaxtune.job import model_folder

folder = model_folder(MODEL)
print(*sorted(f"{f.name:28} {f.stat().st_size:>12,}" for f in folder.iterdir()), sep="\n")
print(json.loads((folder / "config.json").read_text())["architectures"])

# %% [markdown]
# **There and back.** `convert` writes a cache of sharded arrays, from which a big model starts in seconds, and then a Hugging
# Face folder again. Every tensor has to come back with the same bits, and the assertion below says whether it does.

# %%
for made in ("cache", "back", "merged"):
    shutil.rmtree(made, ignore_errors=True)
# %jaxtune convert {folder} cache --to orbax
# %jaxtune convert cache back
before = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
after = {k: v for f in pathlib.Path("back").glob("*.safetensors") for k, v in load_file(f).items()}
assert before.keys() == after.keys()
assert all(before[k].tobytes() == after[k].tobytes() for k in before)
print(len(before), "tensors came back bit by bit")

# %% [markdown]
# **Tune, and look at what comes out.** After LoRA it is a PEFT folder: two matrices for each that was tuned, and an
# `adapter_config.json` that `peft` reads.

# %%
run = jaxtune.train(
    model=MODEL,
    data={"train": DATA, "validation": 0.1, "max_length": 128},
    tuning={"method": "lora", "rank": 4, "alpha": 8},
    optim={"learning_rate": LEARNING_RATE, "warmup": 0.1},
    train={**TRAIN, "steps": STEPS},
    evaluate={"every": 50},
    output="runs/convert",
)
adapter = load_file(run.folder / "export" / "adapter_model.safetensors")
for name in list(adapter)[:4]:
    print(adapter[name].shape, name)

# %% [markdown]
# **Merge.** The product of the two matrices is added to the weight: what comes out is an ordinary model that needs neither
# jaxtune nor peft. The picture shows how much each matrix changed, layer by layer: bright is much.

# %%
# %jaxtune merge {run.folder} merged
whole = {k: v for f in pathlib.Path("merged").glob("*.safetensors") for k, v in load_file(f).items()}
parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
change = np.zeros((len(parts), layers))
for i, part in enumerate(parts):
    for layer in range(layers):
        key = f"model.layers.{layer}.{part}.weight"
        old, new = np.float32(before[key]), np.float32(whole[key])
        change[i, layer] = np.linalg.norm(new - old) / np.linalg.norm(old)
plt.figure(figsize=(6, 3.5), layout="constrained")
plt.imshow(change, aspect="auto")
plt.yticks(range(len(parts)), parts)
plt.xlabel("layer")
plt.colorbar(label="size of the change, relative")
plt.show()

# %% [markdown]
# **Does transformers agree?** The merged folder is opened there, and both answer the same question greedily. The logits
# differ by rounding only, so the texts are the same.

# %%
question = "What does the heron eat?"
ours = jaxtune.load("merged").answer(question, max_new_tokens=12)
print("jaxtune:     ", ours.strip())
try:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("merged")
    model = AutoModelForCausalLM.from_pretrained("merged", dtype="float32")
except ImportError as e:
    print("transformers: not compared,", str(e).strip().splitlines()[0])
else:
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    made = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0][inputs["input_ids"].shape[1] :]
    theirs = tokenizer.decode(made, skip_special_tokens=True)
    print("transformers:", theirs.strip())
    assert theirs.strip() == ours.strip()

# %% [markdown]
# **Where to go from here**
#
# - `%jaxtune merge base out --adapter a=0.7 --adapter b=0.3` mixes several adapters.
# - `%jaxtune convert merged half --dtype bfloat16 --shard-size 2` writes smaller files.
# - An adapter made elsewhere opens here: `jaxtune.load("base", adapter="folder")`.
# - To share it: `jaxtune push` uploads a folder with its model card, when you ask for it.
