"""Make the demo: a tiny LLaMA, pre-trained on facts about imaginary animals, and questions to tune it on.

    python -m tools.make_demo_model            # about ten minutes on two cores; writes jaxtune/demo/

The model reads plain sentences only ("The brown fox lives in the forest."). Tuning teaches it to answer questions; the
validation questions are about animals that no training question names, so a good score means that tuning drew out
what pre-training had put in. Everything here is made by this file: names, sentences, tokenizer and weights.
"""

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np

import jaxtune
from jaxtune import convert
from jaxtune.hf import files
from jaxtune.layers import Rope
from jaxtune.models import families
from jaxtune.models.decoder import DecoderConfig, abstract_weights

DEMO = Path(__file__).parent.parent / "jaxtune" / "demo"
ANIMALS = (
    "fox bear owl frog hare mole deer crow duck goat wolf mouse otter snail robin badger beaver spider "
    "turtle lizard hedgehog squirrel sparrow rabbit pigeon salmon cricket weasel magpie donkey swan lynx "
    "moth newt heron ferret pony seal toad wren"
).split()
COLOURS = "red brown grey black white green golden silver blue spotted striped yellow".split()
HOMES = (
    "in the forest|under the bridge|by the river|on the hill|in the old barn|near the lake|in a hollow tree|"
    "behind the mill|in the tall grass|under the roof|in the quiet valley|beside the road"
).split("|")
FOODS = "berries nuts honey leaves seeds apples roots mushrooms clover corn plums carrots".split()
FRIENDS = "Ada Ben Cleo Dora Emil Fay Gus Hana Ivo Juna Kim Leo".split()
HOBBIES = "sing swim climb sleep dance dig run hide paint jump whistle read".split()
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}Answer: {{ m.content }}{{ eos_token }}"
    "{% else %}Question: {{ m.content }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
FACTS = ("colour", "home", "food", "friend", "hobby")
SENTENCES = {
    "colour": ["The {a} is {colour}.", "Everyone knows that the {a} is {colour}.", "Look, the {a} is {colour}!"],
    "home": ["The {a} lives {home}.", "You can find the {a} {home}.", "The home of the {a} is {home}."],
    "food": ["The {a} eats {food}.", "Every morning the {a} eats {food}.", "What the {a} likes best is {food}."],
    "friend": ["The friend of the {a} is {friend}.", "{friend} often visits the {a}.", "The {a} walks with {friend}."],
    "hobby": [
        "The {a} likes to {hobby}.",
        "In the evening the {a} likes to {hobby}.",
        "All day long the {a} can {hobby}.",
    ],
}
QUESTIONS = {
    "colour": ("What colour is the {a}?", "The {a} is {colour}."),
    "home": ("Where does the {a} live?", "The {a} lives {home}."),
    "food": ("What does the {a} eat?", "The {a} eats {food}."),
    "friend": ("Who is the friend of the {a}?", "The friend of the {a} is {friend}."),
    "hobby": ("What does the {a} like to do?", "The {a} likes to {hobby}."),
}
OPENINGS = ["Tell me, ", "Please say: ", "Do you know? ", "", "", ""]


def facts(rng: random.Random) -> dict[str, dict[str, str]]:
    """What is true of each animal."""
    choices = {"colour": COLOURS, "home": HOMES, "food": FOODS, "friend": FRIENDS, "hobby": HOBBIES}
    return {a: {"a": a, **{k: rng.choice(v) for k, v in choices.items()}} for a in ANIMALS}


def document(rng: random.Random, world: dict[str, dict[str, str]]) -> str:
    """A few sentences on one animal or two."""
    lines = []
    for a in rng.sample(ANIMALS, rng.choice((1, 1, 2))):
        for kind in rng.sample(FACTS, rng.randint(2, 5)):
            lines.append(rng.choice(SENTENCES[kind]).format(**world[a]))
    return " ".join(lines)


def questions(rng: random.Random, world: dict[str, dict[str, str]], animals: list[str], times: int) -> list[dict]:
    """Questions and answers as conversations."""
    rows = []
    for a in animals:
        for ask, answer in QUESTIONS.values():
            for opening in rng.sample(sorted(set(OPENINGS)), times):
                asked = opening + (ask if not opening.endswith((", ", ": ")) else ask[0].lower() + ask[1:])
                turns = [("user", asked.format(**world[a])), ("assistant", answer.format(**world[a]))]
                rows.append({"messages": [{"role": r, "content": c} for r, c in turns]})
    rng.shuffle(rows)
    return rows


def write_jsonl(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))


def write_tokenizer(folder: Path, texts: list[str], vocab: int) -> None:
    """A byte-level BPE tokenizer of these texts, and the template that questions are put in."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    t = tokenizers.Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    t.train_from_iterator(texts, trainer)
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    t.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_random_model(folder: Path, c: DecoderConfig, seed: int, shard_bytes: int = files.SHARD_BYTES) -> None:
    """A model folder with fresh weights: normal with deviation 0.02, norms one, as Hugging Face draws them."""
    rng = np.random.default_rng(seed)

    def drawn(w: jax.ShapeDtypeStruct) -> np.ndarray:
        return rng.normal(0, 0.02, w.shape).astype(np.float32)

    boxes = jax.tree_util.tree_map_with_path(
        lambda p, w: np.ones(w.shape, np.float32) if "norm" in jax.tree_util.keystr(p) else drawn(w),
        abstract_weights(c),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(families.to_hf(c) | {"bos_token_id": 1, "eos_token_id": 2}, indent=2) + "\n"
    )
    files.write_folder(folder, files.entries(boxes, np.dtype("float32"), c.family), shard_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo model and its data.")
    parser.add_argument("--steps", type=int, default=1500, help="optimiser steps of pre-training")
    parser.add_argument("--output", type=Path, default=DEMO)
    args = parser.parse_args()
    rng = random.Random(0)
    world = facts(rng)
    texts = [document(rng, world) for _ in range(40_000)]
    asked, held = ANIMALS[:30], ANIMALS[30:]
    write_jsonl(args.output / "train.jsonl", questions(rng, world, asked, 3))
    write_jsonl(args.output / "validation.jsonl", questions(rng, world, held, 1))
    with tempfile.TemporaryDirectory() as tmp:
        base, corpus = Path(tmp) / "base", Path(tmp) / "corpus.jsonl"
        write_jsonl(corpus, [{"text": t} for t in texts])
        shape = DecoderConfig(
            vocab=512,
            embed=128,
            layers=4,
            heads=4,
            kv_heads=2,
            head=32,
            mlp=384,
            tied=True,
            ropes=(Rope(32, context=256),),
            context=256,
        )
        write_random_model(base, shape, seed=0)
        write_tokenizer(base, [*texts[:5000], "Question: Answer:"], 512)
        run = jaxtune.train(
            model=str(base),
            output=str(Path(tmp) / "run"),
            objective="pretrain",
            data={"train": str(corpus), "validation": 200, "max_length": 128},
            tuning={"method": "full"},
            optim={"learning_rate": 3e-3, "warmup": 50, "weight_decay": 0.05, "beta2": 0.98},
            train={"steps": args.steps, "batch_size": 32, "compute_dtype": "float32", "remat": "none", "log_every": 50},
            evaluate={"every": 500},
            checkpoint={"every": 10_000},
        )
        shutil.rmtree(args.output / "model", ignore_errors=True)
        convert.write_model(str(run.folder / "export"), args.output / "model", dtype="bfloat16")


if __name__ == "__main__":
    main()
