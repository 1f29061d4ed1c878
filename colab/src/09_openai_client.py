# %% [markdown]
# # Fine-tune with OpenAI's client, on your own machine
#
# Code that was written for OpenAI's fine-tuning runs against `jaxtune serve` with another `base_url`: upload a file, create
# a job, wait, ask. Nothing leaves the machine. The service also has a page, for those who write no code.

# %% [markdown]
# **Install**, or use what is there, with what the service needs; the runtime's own `jax` stays.

# %% [install] serve

# %% [markdown]
# **What to change.** `EXAMPLES` of the questions that come along are trained on, for `EPOCHS`. For models of your own start
# the service with `--models FOLDER`, and put the folder's name into `MODEL`.

# %% [parameters]
MODEL = "demo"
EXAMPLES = 450
EPOCHS = 3

# %% [markdown]
# **Start the service** in the background, on this machine's own address and a free port. It prints where it listens; a worker
# beside it trains. On a TPU runtime the worker takes the chip, so this notebook itself never touches JAX.

# %%
import pathlib
import re
import subprocess
import sys
import time

said = open("serve.log", "w")
service = subprocess.Popen(
    [sys.executable, "-m", "jaxtune", "serve", "--demo", "--port", "0"], stdout=said, stderr=subprocess.STDOUT
)
while not (found := re.search(r"base_url +(\S+)", pathlib.Path("serve.log").read_text())):
    assert service.poll() is None, pathlib.Path("serve.log").read_text()
    time.sleep(0.2)
print(pathlib.Path("serve.log").read_text())

# %% [markdown]
# **Upload.** The file is JSON lines, one conversation each, as OpenAI has it. Wrong lines are refused with their number and
# what is wrong with them.

# %%
from openai import OpenAI

client = OpenAI(base_url=found[1], api_key="none")
lines = pathlib.Path("jaxtune-data/demo/train.jsonl").read_text().splitlines()[:EXAMPLES]
pathlib.Path("train.jsonl").write_text("\n".join(lines) + "\n")
file = client.files.create(file=open("train.jsonl", "rb"), purpose="fine-tune")
print(lines[0], file.id, file.bytes, sep="\n")

# %% [markdown]
# **Create a job.** `method` and `hyperparameters` are OpenAI's; what is jaxtune's own goes into `extra_body`. Without numbers
# the service chooses epochs, batch and learning rate by the size of the data.

# %%
job = client.fine_tuning.jobs.create(
    model=MODEL,
    training_file=file.id,
    suffix="animals",
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": EPOCHS}}},
    extra_body={"jaxtune": {"rank": 8}},
)
while job.status not in ("succeeded", "failed", "cancelled"):
    time.sleep(1)
    job = client.fine_tuning.jobs.retrieve(job.id)
print(job.status, job.fine_tuned_model)

# %% [markdown]
# **What happened** is told by the job's events, newest first. The numbers draw the curve; the service's page draws it too,
# while it trains.

# %%
import matplotlib.pyplot as plt

events = client.fine_tuning.jobs.list_events(job.id, limit=100).data[::-1]
print(*(e.message for e in events[:3]), "…", *(e.message for e in events[-3:]), sep="\n")
steps = [(e.data["step"], e.data["train_loss"]) for e in events if e.type == "metrics" and e.data.get("train_loss")]
plt.figure(figsize=(6, 3), layout="constrained")
plt.plot(*zip(*steps, strict=True), marker=".")
plt.xlabel("step")
plt.ylabel("training loss")
plt.show()

# %% [markdown]
# **Ask it**, and the model it came from. A tuned model is called by its name, `ft:…`; the base is read once for both.

# %%
question = [{"role": "user", "content": "What does the heron eat?"}]
for name in (MODEL, job.fine_tuned_model):
    answer = client.chat.completions.create(model=name, messages=question, temperature=0, max_tokens=16)
    print(f"{name:40} {answer.choices[0].message.content.strip()}")

# %% [markdown]
# **Word by word.** With `stream=True` the answer comes as it is made.

# %%
for piece in client.chat.completions.create(
    model=job.fine_tuned_model, messages=question, temperature=0, max_tokens=16, stream=True
):
    print((piece.choices[0].delta.content or "") if piece.choices else "", end="|")

# %% [markdown]
# **Stop the service.** Its data stays in `jaxtune-data`: at the next start, the tuned model is there, and a job that was
# interrupted goes on from its last checkpoint.

# %%
service.terminate()
service.wait(60)
said.close()

# %% [markdown]
# **Where to go from here**
#
# - Run `jaxtune serve --demo` in a terminal and open the page it names: files, jobs, curves, a playground.
# - From a terminal: `jaxtune jobs create train.jsonl --model demo` follows a job with a live line.
# - Before others may reach it, give it a key: `jaxtune keys add me`. See "Security" in the guide.
