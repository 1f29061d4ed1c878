"""Model cards: what the hub reads of them, what they say of a run, and that their code opens the folder."""

import hashlib
import json
import re
import warnings

import pytest
from huggingface_hub import ModelCard

from jaxtune import card, convert, export, job, log, run
from tests.tiny import make_config, write_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with a licence and a card of its own, that lies as the hub's cache has it."""
    folder = write_tiny(tmp_path_factory.mktemp("hub") / "models--you--Tiny-1B" / "snapshots" / "c0ffee", template=True)
    (folder / "LICENSE").write_text("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nto be kept")
    (folder / "README.md").write_text("---\nlanguage: [en, de]\n---\n# Tiny, by its makers")
    return folder


@pytest.fixture(scope="module")
def done(base, sums_file, tmp_path_factory):
    """A run of an adapter."""
    out = tmp_path_factory.mktemp("run") / "my-sums"
    return run.train(
        make_config(base, sums_file, out, data__validation=4, train__steps=2, tuning__rank=2, evaluate__best=True)
    )


def test_the_hub_reads_it(done, base):
    read = ModelCard.load(done / "export" / "README.md")
    data = read.data
    assert (data.base_model, data.license, data.language) == ("you/Tiny-1B", "llama3.2", ["en", "de"])
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert data.base_model_relation == "adapter"
    assert data.tags == ["jaxtune", "lora", "sft"]
    best = min(m["eval_loss"] for m in log.read_metrics(done / "metrics.jsonl") if "eval_loss" in m)
    [found] = [r for r in data.eval_results if r.metric_type == "loss"]
    assert found.metric_value == pytest.approx(best, abs=1e-5)
    assert (found.dataset_name, data.model_name) == ("held out of sums.jsonl", "my-sums")


def test_it_says_what_was_done_and_names_no_folder_of_this_machine(done, base, sums_file):
    text = (done / "export" / "README.md").read_text()
    sha = hashlib.sha256(sums_file.read_bytes()).hexdigest()
    assert f"| `sums.jsonl` | 36 | 4 | {sums_file.stat().st_size:,} | `{sha}` |" in text
    trained = json.loads((done / "environment.json").read_text())[0]
    assert f"jax {trained['versions']['jax']}" in text
    assert "| `tuning.rank` | 2 |" in text
    assert re.search(r"tuned by lora with objective sft: [\d,]+ of [\d,]+ parameters trained \([\d.]+ %\)", text)
    assert re.search(r"2 steps \(exported is step \d\) of 4 rows of at most 32 tokens each, on 1 × cpu in 0\.0", text)
    assert "![loss](loss.png)" in text
    assert (done / "export" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "`llama3.2`, that of the base, you/Tiny-1B ([LICENSE](LICENSE))" in text
    assert (done / "export" / "LICENSE").read_bytes() == (base / "LICENSE").read_bytes()
    assert str(done.parent) not in text
    assert str(sums_file.parent) not in text
    assert (done / "README.md").read_text() == text.replace('folder = "."', 'folder = "export"')


def test_data_that_is_gone_or_too_much_does_not_stop_an_export(tiny, sums_file, tmp_path, monkeypatch):
    lines = sums_file.read_text().splitlines(keepends=True)
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_text("".join(lines[i * 10 : i * 10 + 10]))
    made = job.prepare(make_config(tiny, f"{tmp_path}/*.jsonl", tmp_path / "r"))
    (tmp_path / "0.jsonl").unlink()
    monkeypatch.setattr(export, "_LISTED", 2)
    (tmp_path / "e").mkdir()
    text = card.render(export.run_card(made, tmp_path / "e"))
    sha = hashlib.sha256((tmp_path / "1.jsonl").read_bytes()).hexdigest()
    assert "| `0.jsonl` | 10 | 0 |  | not taken |" in text
    assert re.search(rf"\| `1.jsonl` \| 10 \| 0 \| \d+ \| `{sha}` \|", text)
    assert "| 1 more files | 10 | 0 |  | not taken |" in text
    assert "loss.png" not in text


def _run_snippets(folder, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.chdir(folder)
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    said = []
    for snippet in code:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other packages'
            exec(compile(snippet, "README.md", "exec"), {})
        said.append(capsys.readouterr().out)
    return said


def test_its_code_opens_an_adapter(done, monkeypatch, capsys):
    theirs, ours = _run_snippets(done / "export", monkeypatch, capsys)
    answer = theirs.partition("Hello!")[2]
    assert len(ours) > 8
    assert ours[:8] in answer  # spaces, of a model that has learnt so little


def test_a_merged_model_is_described_and_opens(done, base, tmp_path, monkeypatch, capsys):
    convert.write_model(str(done), tmp_path / "whole")
    text = (tmp_path / "whole" / "README.md").read_text()
    read = ModelCard.load(tmp_path / "whole" / "README.md")
    assert (read.data.base_model, read.data.base_model_relation) == ("you/Tiny-1B", "finetune")
    assert (read.data.library_name, read.data.license) == ("transformers", "llama3.2")
    assert "| my-sums | 1.0 |" in text
    assert "## Data\n\n| file |" in text  # of the run's own card
    assert "by its makers" not in text
    assert (tmp_path / "whole" / "LICENSE").exists()
    assert len(_run_snippets(tmp_path / "whole", monkeypatch, capsys)) == 2


def test_a_conversion_of_a_strange_model_claims_nothing(tiny, tmp_path):
    convert.write_model(str(tiny), tmp_path / "half", dtype="bfloat16")
    read = ModelCard.load(tmp_path / "half" / "README.md")
    assert read.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["jaxtune"],
    }  # fmt: skip
    assert "`tiny` in another form, in bfloat16." in read.text
    assert "See that of the base, tiny, which the folder does not state." in read.text


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("Apache License\n   Version 2.0, January 2004", {"license": "apache-2.0"}),
        ("MIT License\n\nCopyright", {"license": "mit"}),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT", {"license": "llama3"}),
        ("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT", {"license": "llama3.1"}),
        ("All rights are ours.", {"license": "other", "license_name": "as-the-base", "license_link": "LICENSE.txt"}),
    ],
)
def test_licences_are_known_by_their_text(tmp_path, text, licence):
    (tmp_path / "LICENSE.txt").write_text(text)
    assert card.Base("x", tmp_path).licence == licence
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: ours\n---\n")
    assert card.Base("x", tmp_path).licence == {"license": "other", "license_name": "ours"}


def test_metadata_that_is_none(tmp_path):
    for text in ("", "# A model", "---\n: [\n---\n", "---\n- a\n---\n"):
        assert card.read_metadata(text) == {}


def test_a_large_file_is_not_read_for_its_hash(tmp_path, monkeypatch):
    file = tmp_path / "data.jsonl"
    file.write_text("{}")
    assert card.digest(file) == hashlib.sha256(b"{}").hexdigest()
    monkeypatch.setattr(card, "_HASHED", 1)
    assert card.digest(file) == "not taken"


def test_a_strange_card_of_a_base_stops_nothing(tmp_path):
    head = "---\ntags:\ndatasets:\npipeline_tag: image-text-to-text\n---\n# Sees\n\n## Data\n\nnot ours"
    made = card.derived("mine", "Converted.", card.Base("you/theirs", tmp_path), "finetune", source=head)
    text = card.render(made)
    assert card.read_metadata(text)["pipeline_tag"] == "text-generation"  # the part that is read here
    assert "not ours" not in text
    assert "AutoModelForCausalLM" in text
