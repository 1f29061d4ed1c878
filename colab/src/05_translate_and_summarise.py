# %% [markdown]
# # Translate or summarise, and score it
#
# Tasks whose answer is a text need scores of their own: BLEU and chrF compare translations with references, ROUGE
# compares summaries. This notebook tunes a model on pairs of texts and scores it while training and after. One variable
# changes the task.

# %% [markdown]
# **Install**, or use what is there; the runtime's own `jax` stays.

# %% [install]

# %% [markdown]
# **What to change.** `TASK` is `"translation"` or `"summarisation"`. For data of your own, write `train.jsonl` and
# `test.jsonl` with the columns `source` and `target`, or `document` and `summary`. With a real model
# (`"meta-llama/Llama-3.2-1B-Instruct"`, `"Qwen/Qwen2.5-0.5B-Instruct"`) one or two epochs suffice.

# %% [parameters]
TASK = "translation"
MODEL = "demo"
ROWS = 600
EPOCHS = 12
LEARNING_RATE = 5e-3 if MODEL == "demo" else 2e-4
TRAIN = {"batch_size": 16, "compute_dtype": "float32", "remat": "none"} if MODEL == "demo" else {"batch_size": 16}

# %% [markdown]
# **Data to begin with**, from a small grammar of two languages: a colour, an animal, what it does, where. In the test set
# stand combinations that training has not seen, so the model has to take sentences apart to be right. German makes it
# interesting: endings follow the gender of the animal.

# %%
import json
import pathlib
import random

import jaxtune

draw = random.Random(0)
ANIMALS = {"fox": "Fuchs", "dog": "Hund", "frog": "Frosch", "cat": "Katze", "mouse": "Maus", "goat": "Ziege"}
COLOURS = {"red": "rot", "brown": "braun", "white": "weiss", "old": "alt", "small": "klein"}
ACTS = {"sleeps": "schläft", "sings": "singt", "waits": "wartet", "plays": "spielt"}
PLACES = {"in the garden": "im Garten", "by the river": "am Fluss", "in the forest": "im Wald"}


def words():
    """One of each."""
    return [draw.choice(list(d)) for d in (COLOURS, ANIMALS, ACTS, PLACES)]


def translation():
    """A sentence in English and in German."""
    colour, animal, act, place = words()
    name = ANIMALS[animal]
    article = "Die" if name.endswith("e") or name == "Maus" else "Der"
    return {"source": f"The {colour} {animal} {act} {place}.",
            "target": f"{article} {COLOURS[colour]}e {name} {ACTS[act]} {PLACES[place]}."}  # fmt: skip


def summarisation():
    """Three sentences about an animal, and one that holds what matters."""
    colour, animal, act, place = words()
    told = [f"There was a {animal}.", f"It was {colour}.", f"Every day it {act} {place}."]
    return {
        "document": " ".join([told[0], *draw.sample(told[1:], 2)]),
        "summary": f"A {colour} {animal} {act} {place}.",
    }


make = {"translation": translation, "summarisation": summarisation}[TASK]
unique = list({json.dumps(make()): None for _ in range(4 * ROWS)})
held = max(len(unique) // 10, 4)
for name, rows in (("test.jsonl", unique[:held]), ("train.jsonl", unique[held : held + ROWS])):
    if not pathlib.Path(name).exists():
        pathlib.Path(name).write_text("".join(f"{row}\n" for row in rows))
print("".join(open("train.jsonl").readlines()[:3]))

# %% [markdown]
# **Tune, and score while training.** `evaluate.task` answers the validation set and scores the answers as the field does;
# `metric` says by which score the best weights are kept. Loss falls long before the sentences are right: watch how chrF
# (or ROUGE) follows it late, then fast.

# %%
run = jaxtune.train(
    model=MODEL,
    data={"train": "train.jsonl", "format": TASK, "validation": 30, "max_length": 128},
    tuning={"method": "lora", "rank": 32, "alpha": 64},
    optim={"learning_rate": LEARNING_RATE, "warmup": 0.1},
    train={**TRAIN, "epochs": EPOCHS},
    evaluate={
        "every": 0,
        "task": TASK,
        "metric": {"translation": "chrf", "summarisation": "rougeL"}[TASK],
        "best": True,
        "max_samples": 16,
        "max_new_tokens": 32,
    },
    output=f"runs/{TASK}",
)

# %% [markdown]
# **Both curves in one picture.** Loss measures how likely the right words were, one after the other, each time with the
# right ones before. The score measures what the model writes when nobody holds its hand.

# %%
import matplotlib.pyplot as plt

metric = run.config.evaluate.metric
held = [m for m in run.metrics if f"eval_{metric}" in m]
figure, left = plt.subplots(figsize=(7, 4), layout="constrained")
left.plot([m["step"] for m in held], [m["eval_loss"] for m in held], "o-", color="#cc3311")
left.set(xlabel="step", ylabel="validation loss")
right = left.twinx()
right.plot([m["step"] for m in held], [m[f"eval_{metric}"] for m in held], "s-", color="#4477aa")
right.set_ylabel(metric)
plt.show()

# %% [markdown]
# **Score the test set.** The table has every score of the field, with sacrebleu's signature (so that others can compare) and
# a baseline that copies the input. All answers are in `predictions.jsonl`.

# %%
# %jaxtune evaluate {run.folder} --task {TASK} --data test.jsonl --max-samples 40 --max-new-tokens 32

# %% [markdown]
# **Read some.** Scores hide what goes wrong: an article of the wrong gender costs little BLEU, and a native speaker trips
# over it at once.

# %%
for line in (run.folder / "predictions.jsonl").read_text().splitlines()[:5]:
    row = json.loads(line)
    print(f"right: {row['reference']}\nmodel: {row['prediction']}\n")

# %% [markdown]
# **Where to go from here**
#
# - Set `TASK = "summarisation"` and run all again.
# - `%jaxtune predict runs/translation new.jsonl --beams 4 --out out.jsonl` searches for the likeliest sentence as a whole.
# - Swap `source` and `target` (`columns={"source": "target", "target": "source"}`): is the other direction easier?
# - Questions over a text (`qa`, exact match and F1), maths and dialogue are tasks of the same kind.
