"""The verbs, as a user types them."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import jaxtune
from jaxtune import cli
from tests.tiny import write_jsonl, write_tiny

QUICK = ["train.steps=4", "train.batch_size=4", "data.max_length=32", "train.compute_dtype=float32", "train.remat=none"]


def call(*args, code=0):
    """Run a verb in this process and give its exit code's meaning."""
    try:
        cli.main([str(a) for a in args])
    except SystemExit as e:
        assert (e.code or 0) == code
    else:
        assert code == 0


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("m") / "tiny", template=True)


@pytest.fixture(scope="module")
def done(chatty, sums_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "r"
    call("train", f"model={chatty}", f"data.train={sums_file}", "data.validation=6", f"output={out}", *QUICK)
    return out


@pytest.fixture(scope="module")
def another(chatty, sums_file, tmp_path_factory):
    """A second adapter on the same base, of other targets."""
    out = tmp_path_factory.mktemp("run") / "another"
    own = ["tuning.targets=q_proj", "tuning.rank=2", "optim.learning_rate=0.1"]
    call("train", f"model={chatty}", f"data.train={sums_file}", f"output={out}", *QUICK, *own)
    return out


def test_a_run_leaves_what_it_promises(done):
    names = {p.name for p in done.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "events", "loss.png", "checkpoints", "export", "README.md"} <= names
    assert (done / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert any(f.name.startswith("events.out.tfevents") for f in (done / "events").iterdir())
    card = (done / "README.md").read_text()
    assert "| loss |" in card
    assert "sums.jsonl" in card


def test_train_says_what_it_will_do(chatty, sums_file, tmp_path, capsys):
    call("train", f"model={chatty}", f"data.train={sums_file}", f"output={tmp_path}/r", *QUICK)
    out = capsys.readouterr().out
    assert re.search(r"⟦ +\d+</s>⟧", out)
    for name in ("model", "tuning", "data", "steps", "mesh", "memory"):
        assert re.search(rf"^  {name} +\S", out, re.M), name
    assert "per device" in out
    assert re.search(r"^step 4/4  loss \d", out, re.M)


def test_evaluate(done, sums_file, chatty, capsys):
    call("evaluate", done, sums_file)
    after = capsys.readouterr().out
    scores = json.loads((done / "scores.json").read_text())
    assert set(scores) == {"data", "loss", "perplexity", "accuracy"}
    call("evaluate", chatty, sums_file)
    before = capsys.readouterr().out
    assert float(re.search(r"loss +([\d.]+)", after)[1]) < float(re.search(r"loss +([\d.]+)", before)[1])
    call("evaluate", chatty, sums_file, "--adapter", done / "export")
    assert re.search(r"loss +([\d.]+)", capsys.readouterr().out)[1] == re.search(r"loss +([\d.]+)", after)[1]


def test_predict(done, sums_file, tmp_path):
    call(
        "predict",
        done,
        sums_file,
        "--out",
        tmp_path / "p.jsonl",
        "--max-new-tokens",
        5,
        "--max-samples",
        3,
        "--batch-size",
        2,
    )
    rows = [json.loads(x) for x in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert rows[0]["prompt"] == "<s>Question: 0 + 0 =\nAnswer:"
    assert rows[0]["reference"] == " 0"
    assert set(rows[0]) == {"prompt", "prediction", "finish", "reference"}


def test_chat(done, monkeypatch, capsys):
    lines = iter(["1 + 1 =", "/reset", "2 + 2 =", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    call("chat", done, "--max-new-tokens", 4, "--temperature", 0)
    assert capsys.readouterr().out.strip()


def test_chat_with_adapters(done, another, chatty, monkeypatch, capsys):
    lines = ["/adapters", "1 + 1 =", "/adapter none", "/adapter nobody", "/compare 2 + 2 =", "/compare", "3 + 3 ="]
    script = iter([*lines, "/adapters"])
    told = []

    def read(prompt):
        told.append(capsys.readouterr().out)
        if (line := next(script, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    adapters = [x for folder in (done, another) for x in ("--adapter", folder / "export")]
    call("chat", chatty, *adapters, "--max-new-tokens", 4, "--temperature", 0)
    said = dict(zip(lines, told[1:], strict=False))
    assert said["/adapters"] == "* r\n  another\n  none\n"
    assert said["/adapter nobody"] == "/adapter nobody: no adapter of this name; allowed: another, none, r\n"
    assert "has no text" in said["/compare"]
    assert re.findall(r"^\[(.*)\]$", said["/compare 2 + 2 ="], re.M) == ["r", "another", "none"]
    assert told[-1] == "  r\n  another\n* none\n"


def test_predict_with_adapters(done, another, chatty, sums_file, tmp_path):
    """Each answers as it does alone."""
    options = ["--max-new-tokens", 5, "--max-samples", 3, "--logprobs"]
    rows = {}
    for name, folders in {"r": [done], "another": [another], "none": [], "all": [done, another]}.items():
        adapters = [x for f in folders for x in ("--adapter", f / "export")]
        call("predict", chatty, sums_file, "--out", tmp_path / name, *options, *adapters)
        rows[name] = [json.loads(x) for x in (tmp_path / name).read_text().splitlines()]
    for i, row in enumerate(rows.pop("all")):
        assert set(row) == {"prompt", "predictions", "finish", "logprobs", "reference"}
        assert list(row["predictions"]) == ["r", "another", "none"]
        for name, alone in rows.items():
            assert row["prompt"] == alone[i]["prompt"]
            assert row["predictions"][name] == alone[i]["prediction"]
            assert row["finish"][name] == alone[i]["finish"]
            assert row["logprobs"][name] == pytest.approx(alone[i]["logprobs"], abs=1e-4)


def test_prompts_of_adapters_with_templates_of_their_own(done, another, chatty, sums_file, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(another / "export", own)
    (own / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %} ->")
    models = jaxtune.load_several(chatty, [done / "export", own])
    assert models["own"].template != models["r"].template
    call(
        "predict", chatty, sums_file, "--adapter", done / "export", "--adapter", own, "--max-new-tokens", 5,
        "--max-samples", 3, "--out", tmp_path / "p",
    )  # fmt: skip
    row = json.loads((tmp_path / "p").read_text().splitlines()[0])
    assert row["prompt"]["own"] == "0 + 0 = ->"
    assert row["prompt"]["r"] == row["prompt"]["none"] == "<s>Question: 0 + 0 =\nAnswer:"
    assert list(row["predictions"]) == ["r", "own", "none"]


def test_merge_several(done, another, chatty, tmp_path, capsys):
    adapters = ["--adapter", done / "export", "--adapter", f"{another / 'export'}=0.5"]
    call("merge", chatty, tmp_path / "merged", *adapters)
    call("merge", chatty, tmp_path / "sum", *adapters, "--as-adapter")
    merged, summed = (jaxtune.load(tmp_path / f).answer("1 + 1 =", max_new_tokens=6) for f in ("merged", "sum"))
    assert merged == summed
    capsys.readouterr()
    call("merge", chatty, tmp_path / "sum", *adapters, "--as-adapter", code=2)
    assert "exists and is not empty" in capsys.readouterr().err
    call("merge", chatty, tmp_path / "x", "--adapter", f"{done / 'export'}=much", code=2)
    assert "'much' is no weight" in capsys.readouterr().err
    call("chat", chatty, "--adapter", done / "export", "--adapter", done / "export", code=2)
    assert "is given twice" in capsys.readouterr().err


def test_merge_and_convert(done, chatty, tmp_path, capsys):
    call("merge", done, tmp_path / "merged")
    call("convert", tmp_path / "merged", tmp_path / "half", "--dtype", "bfloat16")
    assert (tmp_path / "half" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    whole, half = ((tmp_path / n / "model.safetensors").stat().st_size for n in ("merged", "half"))
    assert 0.4 < half / whole < 0.6
    capsys.readouterr()
    call("merge", done, tmp_path / "merged", code=2)
    assert "exists and is not empty" in capsys.readouterr().err
    call("convert", tmp_path / "merged" / "model.safetensors", tmp_path / "x", code=2)
    assert "model.safetensors: is a file; give the folder that it lies in" in capsys.readouterr().err


def test_validate_touches_nothing(chatty, sums_file, tmp_path, capsys):
    call("validate", f"model={chatty}", f"data.train={sums_file}", f"output={tmp_path}/r", *QUICK)
    out = capsys.readouterr().out
    assert out.rstrip().endswith("valid")
    assert "all tensors fit" in out
    assert not (tmp_path / "r").exists()


def test_schema_and_recipes(tmp_path, capsys):
    call("config-schema")
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"]["model"]["default"] == "demo"
    call("recipes", "ls")
    assert "quickstart" in capsys.readouterr().out
    call("recipes", "show", "quickstart")
    assert "model: demo" in capsys.readouterr().out
    call("recipes", "cp", "quickstart", tmp_path / "mine.yaml")
    assert (tmp_path / "mine.yaml").exists()
    call("recipes", "cp", "quickstart", tmp_path / "mine.yaml", code=2)
    call("recipes", "show", "quickstat", code=2)
    assert "did you mean 'quickstart'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "neither a config nor a key=value"),
        (["nowhere.yaml"], "nowhere.yaml: no such config"),
        (["model=MODEL", "data.train=no.jsonl"], "no.jsonl: no such file"),
        (["model=/no/such/folder", "data.train=DATA"], "model /no/such/folder: no such folder"),
        (["model=MODEL", "data.train=DATA", "tuning.targets=zzz"], "pattern 'zzz' matches no weight"),
        (["model=MODEL", "data.train=DATA", "optim.lr=3"], "did you mean 'learning_rate'?"),
        (["model=MODEL", "data.train=DATA", "data.max_length=8"], "raise it"),
        (
            ["model=MODEL", "data.train=DATA", "mesh.fsdp=3"],
            "× fsdp 3 × expert 1 × context 1 × tensor 1 is not the 1 devices",
        ),
        (["model=EMPTY", "data.train=DATA"], "has no config.json"),
        (["model=MODEL", "data.train=DATA", "output=DATA/r", *QUICK], "look at the path and its rights"),
        (["model=some-org/some-model", "data.train=DATA"], "neither a folder here nor to be had from the hub"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_2(chatty, sums_file, tmp_path, capsys, args, words):
    (tmp_path / "empty").mkdir()
    names = {"MODEL": chatty, "DATA": sums_file, "EMPTY": tmp_path / "empty"}
    args = [re.sub("|".join(names), lambda m: str(names[m[0]]), a) for a in args]
    call(
        "train",
        *args,
        *([f"output={tmp_path}/r"] if args and "=" in args[0] and "output" not in " ".join(args) else []),
        code=2,
    )
    err = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning")]
    assert len(err) == 1
    assert err[0].startswith("error: ")
    assert words in err[0]
    assert not (tmp_path / "r" / "config.yaml").exists()


def test_debug_shows_the_trace():
    with pytest.raises(jaxtune.UserError):
        cli.main(["train", "nowhere.yaml", "--debug"])


def test_the_command_itself():
    done = subprocess.run(
        [sys.executable, "-m", "jaxtune", "train", "x.yaml"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    assert done.returncode == 2
    assert done.stderr == "error: x.yaml: no such config; `jaxtune recipes ls` lists those that come along\n"


def test_python_is_the_same_path(chatty, sums_file, tmp_path):
    run = jaxtune.train(
        model=chatty, data=sums_file, output=tmp_path / "r", tuning={"rank": 2},
        overrides={k: json.loads(v) if v[0] in "0123456789" else v for k, v in (x.split("=") for x in QUICK)},
    )  # fmt: skip
    assert run.metrics[-1]["step"] == 4
    assert isinstance(run.generate("1 + 1 =", max_new_tokens=4), str)
    assert run.config.tuning.rank == 2
    assert isinstance(jaxtune.load(run.folder).answer("2 + 2 =", max_new_tokens=4), str)


def test_a_run_of_relative_paths_opens_from_elsewhere_without_its_export(chatty, sums_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(sums_file, "here.jsonl")
    call("train", f"model={os.path.relpath(chatty)}", "data.train=here.jsonl", "output=r", *QUICK)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    finished = jaxtune.load(tmp_path / "r").answer("1 + 1 =", max_new_tokens=4)
    shutil.rmtree(tmp_path / "r" / "export")
    assert jaxtune.load(tmp_path / "r").answer("1 + 1 =", max_new_tokens=4) == finished


def test_the_template_that_was_trained_with_goes_along(chatty, sums_file, tmp_path):
    from jaxtune.data.templates import TEMPLATES

    call("train", f"model={chatty}", f"data.train={sums_file}", "data.template=roles", f"output={tmp_path}/r", *QUICK)
    exported = jaxtune.load(tmp_path / "r")
    assert exported.template == TEMPLATES["roles"]
    shutil.rmtree(tmp_path / "r" / "export")
    assert jaxtune.load(tmp_path / "r").template == TEMPLATES["roles"]
    call("merge", tmp_path / "r", tmp_path / "merged")
    assert jaxtune.load(tmp_path / "merged").template == TEMPLATES["roles"]


def test_prompts_need_no_answers(done, tmp_path, capsys):
    file = write_jsonl(tmp_path / "p.jsonl", [{"question": "1 + 1 ="}, {"question": "2 + 2 ="}])
    call("predict", done, file, "columns={prompt: question}", "--out", tmp_path / "a.jsonl", "--max-new-tokens", 3)
    rows = [json.loads(x) for x in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [set(r) for r in rows] == [{"prompt", "prediction", "finish"}] * 2
    call("predict", done, file, "columns={prompt: question}", "--out", tmp_path, code=2)
    assert "is a folder" in capsys.readouterr().err


def test_validate_takes_the_mesh_of_another_machine(chatty, sums_file, tmp_path):
    args = [
        f"model={chatty}",
        f"data.train={sums_file}",
        f"output={tmp_path}/r",
        *QUICK,
        "mesh.fsdp=4",
        "mesh.tensor=2",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "jaxtune", "validate", *args], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("valid")


def test_a_long_chat_forgets_its_oldest_turns(done, monkeypatch, capsys):
    lines = iter(["1 + 1 = " * 8, "2 + 2 = " * 8, "3 + 3 = " * 8, "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    call("chat", done, "--max-new-tokens", 4, "--temperature", 0)
    assert "its oldest turns go" in capsys.readouterr().err
