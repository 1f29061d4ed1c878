# %% [markdown]
# # Labels for texts, with metrics
#
# Sentiment, topic, spam, intent: a text comes in, a label goes out. Here the language model's last layer gives way to a
# small head with one output per label, which trains together with LoRA. Afterwards we look at scores that say more than
# "accuracy", and at the texts that the model gets wrong.

# %% [markdown]
# **Install**, or use what is there; the runtime's own `jax` stays.

# %% [install]

# %% [markdown]
# **What to change.** `MODEL` is the tiny model that comes along, a hub id such as `"meta-llama/Llama-3.2-1B"`, or a folder.
# Give `LEARN` and `TEST` your own CSV or JSONL files with the columns `text` and `label`.

# %% [parameters]
MODEL = "demo"
LEARN, TEST = "train.csv", "test.csv"
ROWS = 600
EPOCHS = 4
LEARNING_RATE = 2e-3 if MODEL == "demo" else 2e-4
TRAIN = {"batch_size": 16, "compute_dtype": "float32", "remat": "none"} if MODEL == "demo" else {"batch_size": 16}

# %% [markdown]
# **Data to begin with.** Where the files are not there, we make reviews of restaurants from parts: both parts good, both
# bad, or one of each ("mixed"). "Not" turns a part round. One label in twenty is wrong on purpose, as in real life.

# %%
import csv
import json
import pathlib
import random

import matplotlib.pyplot as plt

import jaxtune

draw = random.Random(0)
THINGS = ["soup", "bread", "waiter", "room", "music", "price", "garden", "coffee"]
WORDS = {"good": ["warm", "lovely", "friendly", "fresh", "perfect"], "bad": ["cold", "awful", "rude", "stale", "wrong"]}


def review():
    """A review and its label."""
    parts, moods = [], []
    for thing in draw.sample(THINGS, 2):
        mood, turned = draw.choice(["good", "bad"]), draw.random() < 0.3
        parts.append(f"the {thing} was {'not ' if turned else ''}{draw.choice(WORDS[mood])}")
        moods.append(("bad" if mood == "good" else "good") if turned else mood)
    label = {"goodgood": "positive", "badbad": "negative"}.get("".join(moods), "mixed")
    return f"{parts[0].capitalize()} and {parts[1]}.", label


for name, count in ((LEARN, ROWS), (TEST, ROWS // 4)):
    if not pathlib.Path(name).exists():
        rows = [review() for _ in range(count)]
        if name == LEARN:
            rows = [(t, draw.choice(["positive", "negative", "mixed"]) if draw.random() < 0.05 else y) for t, y in rows]
        with open(name, "w", newline="") as f:
            csv.writer(f).writerows([["text", "label"], *rows])
print("".join(open(LEARN).readlines()[:5]))

# %% [markdown]
# **Look before training.** `prepare` reads the file as a careful person would: duplicates, contradictions, rare labels,
# labels that are likely wrong. With `--yes` it repairs what is safe, splits off a validation set, and writes a report.
# Does it find some of the wrong labels?

# %%
# %jaxtune prepare {LEARN} --format classification --yes --split 0.1 --out prepared --skip near_duplicates

# %% [markdown]
# **Tune.** `objective: classification` puts the head on. The best weights by macro-F1 on the validation set are kept,
# and three evaluations without a better one end the run. Macro-F1 counts each label the same, however rare it is.

# %%
run = jaxtune.train(
    model=MODEL,
    objective="classification",
    data={
        "train": "prepared/train.jsonl",
        "validation": "prepared/validation.jsonl",
        "format": "classification",
        "max_length": 64,
    },
    tuning={"method": "lora", "rank": 16, "alpha": 32},
    optim={"learning_rate": LEARNING_RATE, "warmup": 0.1},
    train={**TRAIN, "epochs": EPOCHS},
    evaluate={"every": 0, "metric": "f1_macro", "best": True, "patience": 3},
    output="runs/reviews",
)

# %% [markdown]
# **Score it on texts it has never seen.** The table puts the model beside a baseline that always says the commonest label.
# If the two are close, nothing was learned, however high the accuracy looks.

# %%
# %jaxtune evaluate {run.folder} {TEST}

# %% [markdown]
# **The confusion matrix**: rows are what is right, columns what the model said. Mistakes between "mixed" and the others are
# to be expected; mistakes between "positive" and "negative" would be a bad sign.

# %%
plt.figure(figsize=(6, 5))
plt.imshow(plt.imread(run.folder / "confusion.png"))
plt.axis("off")
plt.show()

# %% [markdown]
# **Read the mistakes.** Nothing teaches more about data. Are they the model's mistakes, or the labels'?

# %%
answers = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()]
texts = [row["text"] for row in csv.DictReader(open(TEST))]
wrong = [(t, a) for t, a in zip(texts, answers, strict=True) if a["prediction"] != a["reference"]]
print(f"{len(wrong)} of {len(texts)} are wrong")
for text, answer in wrong[:8]:
    print(f"{answer['reference']:>9} taken for {answer['prediction']:<9} {text}")

# %% [markdown]
# **Where to go from here**
#
# - Set `tuning={"method": "freeze", "last": 1, "train": ["head"]}`: how far does a head alone come?
# - `objective: regression` predicts a number, `token_classification` tags each word, `span_qa` finds answers in a text.
# - Labels can also be answered in words, without a head: `evaluate: {task: classification}` with `objective: sft`.
# - `%jaxtune merge runs/reviews whole` writes a `…ForSequenceClassification` folder that transformers opens.
