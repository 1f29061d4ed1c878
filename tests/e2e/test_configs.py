"""Every recipe that comes along reads, and trains at toy size on a tiny model; the quickstart as it is."""

import pytest

from jaxtune import cli, config, run, tuned
from tests.tiny import write_jsonl, write_tiny

RECIPES = sorted(p.stem for p in cli.recipe_folder().glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_train_at_toy_size(name, tmp_path):
    file = cli.recipe_folder() / f"{name}.yaml"
    head = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert f"jaxtune train {name}.yaml" in "\n".join(head)
    assert any("Result:" in line for line in head)
    assert any("Hardware:" in line for line in head)
    c = config.load(file)
    rows = {
        "pretrain": [{"text": f"the fox eats {i} berries"} for i in range(60)],
        "classification": [{"text": f"the fox eats {i}", "label": "even odd".split()[i % 2]} for i in range(60)],
        "translation": [{"en": f"{i}", "de": f"{i}"} for i in range(60)],
    }.get(
        c.data.format if c.objective == "sft" else c.objective,
        [{"prompt": f"{i}", "completion": f" {i}"} for i in range(60)],
    )
    small = {
        "model": write_tiny(tmp_path / "m", layers=4, tied=False),
        "data.train": write_jsonl(tmp_path / "d.jsonl", rows),
        "data.max_length": 16, "train.batch_size": 4, "train.accumulation": 2, "train.steps": 2,
        "train.epochs": 1, "output": tmp_path / "r", "optim.warmup": 0, "evaluate.max_samples": 2,
        "evaluate.max_new_tokens": 4, "data.validation": 4 if c.data.validation else 0,
    }  # fmt: skip
    out = run.train(config.load(file, config.nested(small)))
    assert (out / "export").exists()
    assert [m["step"] for m in tuned.Run(out).metrics if "eval_loss" in m] in ([], [0, 2])


def test_the_demo_learns_what_its_head_comment_says(tmp_path):
    c = config.load(
        cli.recipe_folder() / "quickstart.yaml", config.nested({"output": tmp_path / "r", "train.steps": 60})
    )
    r = tuned.Run(run.train(c))
    held = [m for m in r.metrics if "eval_loss" in m]
    assert held[0]["eval_accuracy"] < 0.7
    assert held[-1]["eval_accuracy"] > 0.95
    assert r.generate("What does the heron eat?").strip() == "The heron eats apples."
