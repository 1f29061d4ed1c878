"""Every recipe that comes along reads and fits together; some train at toy size; the quickstart as it is."""

import re

import pytest

from jaxtune import card, cli, config, job, run, tuned
from jaxtune.cli.recipes import GROUPS, read_recipe
from tests.tiny import write_jsonl, write_tiny

RECIPES = sorted(p.stem for p in cli.recipe_folder().glob("*.yaml"))
ROWS = {
    "pretrain": lambda i: {"text": f"the fox eats {i} berries"},
    "classification": lambda i: {"text": f"the fox eats {i}", "label": "even odd".split()[i % 2]},
    "regression": lambda i: {"text": f"the fox eats {i}", "label": i},
    "token_classification": lambda i: {"tokens": ["the", "fox"], "tags": ["O", "B-animal"]},
    "qa": lambda i: {"context": f"ab {i}", "question": "a?", "answers": {"text": [f"{i}"], "answer_start": [3]}},
    "translation": lambda i: {"en": f"{i}", "de": f"{i}"},
    "summarisation": lambda i: {"document": f"{i} {i}", "summary": f"{i}"},
    "maths": lambda i: {"question": f"{i}?", "answer": f"#### {i}"},
    "choice": lambda i: {"question": f"{i}?", "choices": ["a", "b"], "answer": i % 2},
    "chat": lambda i: {"prompt": f"{i}", "completion": f" {i}"},
}


@pytest.fixture(scope="module")
def tiny4(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("m") / "tiny", layers=4, tied=False)


def at_toy_size(name, model, folder):
    """A recipe's config on a tiny model and rows that fit it."""
    file = cli.recipe_folder() / f"{name}.yaml"
    c = config.load(file)
    form = c.data.format if c.data.format in ROWS else c.objective if c.objective in ROWS else "chat"
    folder.mkdir(parents=True, exist_ok=True)
    held, data = (write_jsonl(folder / f, [ROWS[form](i) for i in range(n)]) for f, n in (("h", 4), ("d", 60)))
    data, held = (f.rename(f.with_suffix(".jsonl")) for f in (data, held))
    length = 96 if c.data.template != "auto" else 24 if c.data.format in ("qa", "choice") else 16
    small = {
        "model": model, "data.train": data, "data.max_length": length,
        "data.stride": 2, "data.workers": 0, "train.batch_size": 4, "train.accumulation": 2, "train.steps": 2,
        "train.epochs": 1, "output": folder / "r", "optim.warmup": 0, "evaluate.max_samples": 2,
        "evaluate.max_new_tokens": 4, "tuning.rank": 2, "tuning.init_rank": 3, "tuning.last": 2,
        "data.validation": held if c.data.streaming else 4 if c.data.validation else 0,
    }  # fmt: skip
    if c.distill is not None:
        small["distill.teacher"] = model
    keys = set(type(c.tuning).model_fields)
    small = {k: v for k, v in small.items() if not k.startswith("tuning.") or k.removeprefix("tuning.") in keys}
    return config.load(file, config.nested(small))


@pytest.fixture(scope="module")
def drawn():
    """What has been looked at already: recipes that differ in sizes alone are the same at toy size."""
    return set()


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_read_and_fit_together(name, tiny4, tmp_path, drawn):
    text = (cli.recipe_folder() / f"{name}.yaml").read_text()
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert f"jaxtune train {name}.yaml" in head
    assert "Result:" in head
    assert "Hardware:" in head
    about = read_recipe(cli.recipe_folder() / f"{name}.yaml")
    assert about.group in GROUPS
    c = config.load(cli.recipe_folder() / f"{name}.yaml")
    assert about.method == ("dora" if getattr(c.tuning, "dora", False) else c.tuning.method)
    assert c.output == str(cli.recipe_folder() / "runs" / name) or name in ("quickstart",)
    d = c.data
    key = repr([c.tuning, c.distill, c.objective, d.format, d.template, d.thinking, d.streaming, c.mesh, c.optim.name,
                c.evaluate.task, c.evaluate.metric, c.train.param_dtype])  # fmt: skip
    if key in drawn:
        return
    drawn.add(key)
    made = job.prepare(at_toy_size(name, tiny4, tmp_path))
    assert made.steps == 2
    assert job.trained(made) > 0


@pytest.mark.parametrize("name", ["classify", "llama3-8b-lora"])
def test_recipes_train_at_toy_size(name, tiny4, tmp_path):
    out = run.train(at_toy_size(name, tiny4, tmp_path))
    assert "## How to load it" in (out / "export" / card.FILE).read_text()
    assert [m["step"] for m in tuned.Run(out).metrics if "eval_loss" in m] == [0, 2]


def test_the_demo_learns_what_its_head_comment_says(tmp_path):
    c = config.load(
        cli.recipe_folder() / "quickstart.yaml", config.nested({"output": tmp_path / "r", "train.steps": 60})
    )
    r = tuned.Run(run.train(c))
    held = [m for m in r.metrics if "eval_loss" in m]
    assert held[0]["eval_accuracy"] < 0.7
    assert held[-1]["eval_accuracy"] > 0.95
    assert r.generate("What does the heron eat?").strip() == "The heron eats apples."


def test_recipes_are_listed_by_what_they_are_for(capsys):
    def ls(*words):
        with pytest.raises(SystemExit) as e:
            cli.main(["recipes", "ls", *words])
        return e.value.code, capsys.readouterr()

    code, said = ls("QLoRA", "v5e-1")
    assert (code, said.out.splitlines()[0]) == (0, "chat:")
    assert re.fullmatch(r"  llama3\.2-3b-qlora-v5e-1 +qlora +v5e-1 \(Colab\) +Low-rank .*", said.out.splitlines()[1])
    code, said = ls()
    assert [line for line in said.out.splitlines() if line.endswith(":")][:2] == ["start here:", "chat:"]
    assert len([line for line in said.out.splitlines() if line.startswith("  ")]) == len(RECIPES)
    code, said = ls("no-such-thing")
    assert code == 2
    assert "no recipe has all of the words no-such-thing" in said.err
