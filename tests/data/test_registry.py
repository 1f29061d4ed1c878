import json

import pytest

from jaxtune.config import Data, Source
from jaxtune.data import formats, registry
from jaxtune.data.examples import Conversation, Document, Judged, Message, Pair
from jaxtune.errors import UserError

TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ENTRIES = {
    "plain": {"file_name": "plain.json"},
    "asked": {"file_name": "asked.jsonl", "columns": {"prompt": "q", "response": "a", "history": "before"}},
    "text": {"file_name": "text.txt", "columns": {"prompt": "text"}},
    "chat": {"file_name": "chat.json", "formatting": "sharegpt", "columns": {"messages": "turns", "system": "s"}},
    "tagged": {"file_name": "t.json", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": TAGS},
    "openai": {"file_name": "t.json", "formatting": "openai", "columns": {"messages": "messages"}, "tags": TAGS},
    "pairs": {"file_name": "p.json", "ranking": True, "columns": {"prompt": "q", "chosen": "yes", "rejected": "no"}},
    "judged": {"file_name": "k.json", "formatting": "sharegpt", "tags": TAGS,
               "columns": {"messages": "messages", "kto_tag": "label"}},
    "hub": {"hf_hub_url": "owner/name", "subset": "en", "split": "test", "folder": "sub", "num_samples": 5},
    "cloud": {"cloud_file_name": "s3://bucket/a.jsonl"},
    "script": {"script_url": "a_script"},
    "elsewhere": {"ms_hub_url": "a/b"},
    "pictures": {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "m", "images": "pics"}},
    "typo": {"file_nam": "a.json"},
    "bad_column": {"file_name": "a.json", "columns": {"promt": "q"}},
    "unranked": {"file_name": "a.json", "ranking": True},
}  # fmt: skip
FILES = {
    "plain.json": [{"instruction": "Add.", "input": "1 2", "output": "3", "system": "not named, so not read"}],
    "asked.jsonl": [{"q": "Q", "a": "A", "before": [["x", "y"]], "input": "not named, so not read"}],
    "chat.json": [{"turns": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "s": "S"}],
    "t.json": [{"messages": TURNS}],
    "p.json": [{"q": "Q", "yes": "Y", "no": "N"}],
    "k.json": [{"messages": TURNS, "label": False}],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps(ENTRIES))
    (tmp_path / "text.txt").write_text("One line\n")
    for name, rows in FILES.items():
        text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(r) + "\n" for r in rows)
        (tmp_path / name).write_text(text)
    return tmp_path


def one(folder, name):
    [source], _ = registry.resolve(Data(train=name, registry=str(folder)))
    return source


def contents(e):
    return [(m.role, m.content) for m in e.messages]


def test_entries_read_their_files(folder):
    def read(name):
        [e] = formats.read(one(folder, name))
        return e

    assert contents(read("plain")) == [("user", "Add.\n1 2"), ("assistant", "3")]
    assert contents(read("asked")) == [("user", "x"), ("assistant", "y"), ("user", "Q"), ("assistant", "A")]
    assert read("text") == Document("One line", str(folder / "text.txt:1"))
    assert contents(read("chat")) == [("system", "S"), ("user", "Hi"), ("assistant", "Hello")]
    for name in ("tagged", "openai"):
        assert contents(read(name)) == [("user", "Hi"), ("assistant", "Hello")]
    pair = read("pairs")
    assert isinstance(pair, Pair)
    assert [pair.prompt[0].content, pair.chosen[0].content, pair.rejected[0].content] == ["Q", "Y", "N"]
    judged = read("judged")
    assert isinstance(judged, Judged)
    assert not judged.good
    assert judged.conversation.messages[-1] == Message("assistant", "Hello")
    assert isinstance(judged.conversation, Conversation)


def test_hub_and_cloud(folder):
    hub = one(folder, "hub")
    assert (hub.path, hub.subset, hub.split, hub.max_samples) == ("hf://owner/name/sub", "en", "test", 5)
    assert one(folder, "cloud").path == "s3://bucket/a.jsonl"


def test_names_with_commas_and_validation_names(folder):
    train, held = registry.resolve(
        Data(train="plain, asked", validation="chat", registry=str(folder / "dataset_info.json"))
    )
    assert [s.format for s in (*train, *held)] == ["alpaca", "alpaca", "sharegpt"]
    assert registry.resolve(Data(train="plain", validation=0.1, registry=str(folder)))[1] == []


def test_the_config_holds_before_the_registry(folder):
    sources = [Source(path="hub", max_samples=9, weight=2.0, split="dev"), Source(path="hub", max_samples=2)]
    first, second = registry.resolve(Data(train=sources, registry=str(folder)))[0]
    assert (first.max_samples, first.weight, first.split, first.subset) == (5, 2.0, "dev", "en")
    assert second.max_samples == 2


def test_without_a_registry_sources_stay(folder):
    data = Data(train="a,b.jsonl", columns={"prompt": "q"})
    assert registry.resolve(data) == (data.sources, [])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("plian", "the registry has no 'plian'; did you mean 'plain'"),
        ("script", "script_url 'a_script' is not read here; download"),
        ("elsewhere", "ms_hub_url 'a/b' is not read here"),
        ("pictures", "'pics' holds images, which are not read"),
        ("typo", "unknown key 'file_nam'; did you mean 'file_name'"),
        ("bad_column", "unknown name 'promt'; did you mean 'prompt'"),
        ("unranked", "ranking needs the columns 'chosen' and 'rejected'"),
    ],
)
def test_what_is_refused(folder, name, words):
    with pytest.raises(UserError) as e:
        one(folder, name)
    assert words in str(e.value)


def test_registries_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="dataset_info.json: No such file"):
        registry.resolve(Data(train="x", registry=str(tmp_path)))
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        registry.resolve(Data(train="x", registry=str(tmp_path)))
    (tmp_path / "dataset_info.json").write_text("[]")
    with pytest.raises(UserError, match="an object of names was expected"):
        registry.resolve(Data(train="x", registry=str(tmp_path)))
