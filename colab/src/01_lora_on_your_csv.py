# %% [markdown]
# # Tune a LLaMA on your CSV with LoRA
#
# You have a table of questions and answers, and want a model that answers as the table does. This notebook tunes one
# in a few minutes and asks it. It begins with a tiny model that comes with jaxtune, so that everything runs on a free CPU
# without any download; change `MODEL` to take a real one.
#
# LoRA (Hu et al., 2021) leaves the model's weights as they are and learns two thin matrices beside each of them. What
# comes out is a file of a few megabytes, in the format of Hugging Face's `peft`.

# %% [markdown]
# **Install.** On Colab this takes about a minute and leaves the runtime's own `jax` in place. In a checkout of jaxtune it
# installs from there. `%load_ext` gives the verbs of the command line as `%jaxtune …`, in this very process: a TPU has
# room for only one.

# %% [install]

# %% [markdown]
# **What to change.** `MODEL` is `"demo"`, a hub id such as `"meta-llama/Llama-3.2-1B-Instruct"` (ask for access on its page,
# then `hf auth login`), or a folder. `CSV` is your file; the next cell writes one if it is not there. Real models want a
# smaller learning rate than the tiny one, about three epochs, and jaxtune's own settings for memory and precision.

# %% [parameters]
MODEL = "demo"
CSV = "questions.csv"
EPOCHS = 12
LEARNING_RATE = 5e-3 if MODEL == "demo" else 2e-4
TRAIN = {"batch_size": 16, "compute_dtype": "float32", "remat": "none"} if MODEL == "demo" else {"batch_size": 16}

# %% [markdown]
# **The table.** It has a column with what is asked and one with what is to be answered; their names are yours. Here we
# write the example that comes along: 450 questions about animals. On Colab, `google.colab.files.upload()` brings your own.

# %%
import csv
import json
import pathlib
import shutil

import jaxtune

if not pathlib.Path(CSV).exists():
    demo = pathlib.Path(jaxtune.__file__).parent / "demo" / "train.jsonl"
    rows = [json.loads(line)["messages"] for line in demo.read_text().splitlines()]
    with open(CSV, "w", newline="") as f:
        csv.writer(f).writerows([["question", "answer"], *([m["content"] for m in row] for row in rows)])
print("".join(open(CSV).readlines()[:4]))

# %% [markdown]
# **Look at it as the model will.** `preview` shows rows after the chat template; what stands in colour, or between ⟦ and
# ⟧, is what the loss is taken on: the answers only. If the wrong column is marked, change `columns`.

# %%
# %jaxtune preview model={MODEL} data.train={CSV} data.columns.prompt=question data.columns.completion=answer --n 2

# %% [markdown]
# **Tune.** One row in ten is held out to see whether the model learns the matter or only these sentences. Watch both
# lines fall; when the red one (held out) turns upwards while the blue one still falls, the model begins to learn by
# heart, and fewer epochs or more data would be better.

# %%
run = jaxtune.train(
    model=MODEL,
    data={
        "train": CSV,
        "columns": {"prompt": "question", "completion": "answer"},
        "validation": 0.1,
        "max_length": 128,
    },
    tuning={"method": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"},
    optim={"learning_rate": LEARNING_RATE, "warmup": 0.1},
    train={**TRAIN, "epochs": EPOCHS, "log_every": 5},
    evaluate={"every": 20},
    output="runs/lora-csv",
)

# %% [markdown]
# **The curve** is also in the run folder, as `loss.png`; a run shows it when it stands alone in a cell. Beside it lie
# `metrics.jsonl`, the checkpoints, the config and a model card.

# %%
run

# %% [markdown]
# **Ask it.** The same question to the model before and after. Decoding is greedy (`temperature=0`), so the answers
# are the same each time; try your own questions, also some that are not in the table.

# %%
question = "What does the heron eat?"
before = jaxtune.load(MODEL).answer(question, max_new_tokens=24, temperature=0)
after = run.generate(question, max_new_tokens=24, temperature=0)
print(f"before: {before.strip()}\nafter:  {after.strip()}")

# %% [markdown]
# **What was learned, in bytes.** The adapter's folder opens in `peft` and in jaxtune. `merge` lays it into the base and
# writes a whole model, for servers that know nothing of adapters.

# %%
for file in sorted((run.folder / "export").iterdir()):
    print(f"{file.stat().st_size:>9,} bytes  {file.name}")
shutil.rmtree("merged-model", ignore_errors=True)
# %jaxtune merge {run.folder} merged-model

# %% [markdown]
# **Where to go from here**
#
# - Raise `rank` to 16 or 32: does the held-out loss fall further? The adapter grows in step.
# - `tuning={"method": "lora", "dora": True}` learns directions and magnitudes apart; `"init": "pissa"` starts elsewhere.
# - Run the tuning cell again with the same `output`: it sees that it is finished. After a lost session it goes on
#   where it stood; on Colab put `output` on Drive for that.
# - Next: [classification with metrics](02_classification.ipynb), or [ways to tune side by side](03_ways_to_tune.ipynb).
