"""The first batch of a translated config against what LLaMA-Factory itself makes of the same rows."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxtune import config
from jaxtune.data import formats, pipeline, registry
from jaxtune.errors import UserError
from jaxtune.hf import tokenizer

HERE = Path(__file__).parent.parent / "goldens" / "llamafactory"
CASES = {c["name"]: c for c in json.loads((HERE / "batches.json").read_text())["cases"]}

# Where a model's makers write something else than LLaMA-Factory, theirs is what is trained on here: white space, which
# is left out below, and these words, which one of the two has.
OTHER_TEXT: dict[str, list[str]] = {
    "llama2_lora_sft": [],  # a space before the token that ends an answer
    "zephyr_lora_sft": [],  # a newline after each turn
    "alpaca_lora_sft": ["<s>"],  # at the beginning
    "vicuna_lora_sft": ["<s>"],
    "deepseekr1_lora_sft": ["<think>", "</think>"],  # an empty block before each answer
}
# These templates write an earlier turn otherwise once more follows, so what would be trained on is nothing that the
# model ever sees: how many examples are refused for it.
REFUSED = {
    "mistral_lora_sft": 2,  # the system message stands at the last question
    "qwen3_nothinking": 4,  # the empty block stands before the last answer
}
OTHER_ENDS = ("llama3_pretrain", "llama2_pretrain")
EQUAL = sorted(CASES.keys() - OTHER_TEXT.keys() - REFUSED.keys() - {*OTHER_ENDS})


@pytest.fixture(scope="module")
def words(assets, tmp_path_factory):
    """Tokenizers by name."""
    read = {}

    def of(name):
        if name not in read:
            folder = tmp_path_factory.mktemp(name)
            for file in (assets / "tokenizers" / name).iterdir():
                if file.suffix == ".gz":
                    (folder / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
                else:
                    shutil.copy(file, folder)
            read[name] = tokenizer.load(folder)
        return read[name]

    return of


def translated(case):
    keys = {**case["given"], "model_name_or_path": "m", "dataset_dir": str(HERE)}
    return config.load(None, keys, {"data": {"workers": 0, "cache": False}})


def ours(case, tokenizer):
    """Ids and masks of all rows."""
    c = translated(case)
    rows = pipeline.prepare(c.data, tokenizer, c.train.seed, c.objective).train
    assert [Path(o.rpartition(":")[0]).stem for o in rows.origins] == [
        s.path for s in c.data.train for _ in json.loads((HERE / f"{s.path}.json").read_text())[: s.max_samples]
    ]
    return [(e.ids.tolist(), e.mask.tolist()) for e in rows.examples]


def theirs(case):
    return [(row["ids"], mask(row).tolist()) for row in case["rows"]]


def mask(row):
    """Of the stretches that are labels."""
    out = np.zeros(len(row["ids"]), bool)
    for start, stop in row["trained"]:
        out[start:stop] = True
    return out


@pytest.mark.parametrize("name", EQUAL)
def test_ids_and_labels_are_equal(words, name):
    case = CASES[name]
    assert ours(case, words(case["tokenizer"])) == theirs(case)


@pytest.mark.parametrize("name", OTHER_TEXT)
def test_the_makers_text_differs_as_known(words, name):
    case, tokenizer = CASES[name], words(CASES[name]["tokenizer"])

    def texts(rows):
        for ids, trained in rows:
            for kept in (ids, [i for i, t in zip(ids, trained, strict=True) if t]):
                text = tokenizer.decode(kept)
                for word in OTHER_TEXT[name]:
                    text = text.replace(word, "")
                yield "".join(text.split())

    mine, other = ours(case, tokenizer), theirs(case)
    assert [*texts(mine)] == [*texts(other)]
    assert mine != other


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_prompt_would_show_is_refused(words, name):
    case = CASES[name]
    c, tokenizer = translated(case), words(case["tokenizer"])
    examples = [e for s in registry.resolve(c.data)[0] for e in formats.read(s)]
    encoded = pipeline.encoder(c.data, tokenizer, pipeline.choose_template(c.data, tokenizer, examples, []), "sft")
    refused = 0
    for example, (ids, trained) in zip(examples, theirs(case), strict=True):
        try:
            [e] = encoded(example).pieces
        except UserError as e:
            assert "rewrites turn" in str(e)
            refused += 1
        else:
            assert (e.ids.tolist(), e.mask.tolist()) == (ids, trained)
    assert refused == REFUSED[name]


def test_plain_texts_begin_and_end_as_the_tokenizer_says(words):
    """They begin a text only where the tokenizer has an `add_bos_token`, which Llama 3's has not; and the end of one is
    no label where it is what fills up a batch too."""
    case = CASES["llama3_pretrain"]
    bos = words("llama3").bos_token_id
    assert [ids for ids, _ in ours(case, words("llama3"))] == [[bos, *ids] for ids, _ in theirs(case)]
    case = CASES["llama2_pretrain"]
    assert [(ids, [*m[:-1], False]) for ids, m in ours(case, words("llama2"))] == theirs(case)
    assert all(m[-1] for _, m in ours(case, words("llama2")))
