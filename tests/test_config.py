from pathlib import Path

import pytest
import yaml

from jaxtune import config
from jaxtune.errors import UserError


def load(tmp_path, text, *pairs):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return config.load(file, config.parse_overrides(pairs))


def test_defaults_survive_a_round_trip(tmp_path):
    c = config.Config()
    (tmp_path / "c.yaml").write_text(config.dump(c.model_copy(update={"output": str(tmp_path)})))
    assert config.load(tmp_path / "c.yaml").model_copy(update={"output": c.output}) == c


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.5e-4", "1e4", "-2e+3"])
def test_exponents_are_numbers(tmp_path, text):
    assert config.read_yaml(_file(tmp_path, f"a: {text}"))["a"] == float(text)


def _file(folder, text):
    (folder / "x.yaml").write_text(text)
    return folder / "x.yaml"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: {lerning_rate: 1}", "unknown key optim.lerning_rate; did you mean 'learning_rate'?"),
        ("optim: {lr: 1}", "did you mean 'learning_rate'?"),
        ("tuning: {method: lora, rnk: 3}", "unknown key tuning.rnk; did you mean 'rank'?"),
        ("tuning: {method: full, rank: 3}", "unknown key tuning.rank"),
        ("tuning: {method: lorra}", "'lorra' is unknown; allowed: full, freeze, lora"),
        ("tuning: {method: freeze}", "nothing would train"),
        ("data: {train: [{path: a.jsonl, frmat: x}]}", "unknown key data.train.0.frmat; did you mean 'format'?"),
        ("train: {steps: 0}", "train.steps: input should be greater than 0"),
        ("train: {batch_size: 6, accumulation: 4}", "batch_size 6 is not a multiple of train.accumulation 4"),
        ("mesh: {data: -1, fsdp: -1}", "only one axis can be -1"),
        ("a: 1\na: 2", "line 2: key 'a' stands twice"),
        ("- 1", "a mapping of keys was expected, this is a list"),
        ("a: [", "not YAML"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path, text, words):
    with pytest.raises(UserError) as e:
        load(tmp_path, text)
    assert words in str(e.value)
    assert str(tmp_path) in str(e.value)
    assert "\n" not in str(e.value)


def test_all_mistakes_come_at_once(tmp_path):
    with pytest.raises(UserError, match=r"unknown key foo.*unknown key bar|unknown key bar.*unknown key foo"):
        load(tmp_path, "foo: 1\nbar: 2")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml: no such config"):
        config.load(tmp_path / "nowhere.yaml")


def test_paths_of_a_file_start_there_and_of_overrides_here(tmp_path):
    c = load(tmp_path, "model: m\noutput: out\ndata: {train: a.jsonl, validation: b.jsonl}", "data.train=z.jsonl")
    assert c.model == str(tmp_path / "m")
    assert c.output == str(tmp_path / "out")
    assert c.data.validation == str(tmp_path / "b.jsonl")
    assert c.data.train == "z.jsonl"


def test_a_hub_id_and_the_demo_stay_as_they_are(tmp_path):
    assert load(tmp_path, "model: meta-llama/Llama-3.1-8B").model == "meta-llama/Llama-3.1-8B"
    assert load(tmp_path, "model: demo").model == "demo"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert load(tmp_path, "model: org/name").model == str(tmp_path / "org" / "name")


def test_overrides_win_and_another_method_starts_afresh(tmp_path):
    text = "tuning: {method: lora, rank: 3}\ntrain: {steps: 5, batch_size: 4}"
    c = load(tmp_path, text, "train.steps=7", "tuning.rank=9")
    assert (c.train.steps, c.train.batch_size, c.tuning.rank) == (7, 4, 9)
    assert load(tmp_path, text, "tuning.method=full").tuning == config.Full(method="full")


@pytest.mark.parametrize("pair", ["steps", "=3", "a..b=1", "a.b=[1"])
def test_bad_overrides_are_named(pair):
    with pytest.raises(UserError, match="key=value|not YAML"):
        config.parse_overrides([pair])


def test_every_key_is_documented():
    def undocumented(schema, defs, where=""):
        for name, p in schema.get("properties", {}).items():
            ref = p.get("$ref", "").rsplit("/", 1)[-1]
            if ref:
                yield from undocumented(defs[ref], defs, f"{where}{name}.")
            elif "description" not in p and "discriminator" not in p and name != "method":
                yield where + name

    schema = config.Config.model_json_schema()
    defs = schema["$defs"]
    assert not list(undocumented(schema, defs))
    assert not [n for d in ("Full", "Freeze", "Lora", "Source") for n in undocumented(defs[d], defs)]


def test_a_dump_names_every_key():
    assert set(yaml.safe_load(config.dump(config.Config()))) == set(config.Config.model_fields)


def test_nested_keys_take_paths():
    assert config.nested({"data.train": Path("/a/b.jsonl")}) == {"data": {"train": "/a/b.jsonl"}}


def test_home_and_the_method_that_goes_without_saying(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    c = load(tmp_path, "model: ~/m\ndata: {train: ~/x.jsonl}\ntuning: {rank: 4}")
    assert (c.model, c.data.train, c.tuning.rank) == ("/home/someone/m", "/home/someone/x.jsonl", 4)
    assert load(tmp_path, "tuning: {rank: 4}", "tuning.method=full").tuning == config.Full(method="full")


@pytest.mark.parametrize("text", ["train: {epochs: .inf}", "data: {validation: .nan}", "train: {seed: 99999999999999}"])
def test_numbers_that_are_none_are_refused(tmp_path, text):
    with pytest.raises(UserError):
        load(tmp_path, text)
