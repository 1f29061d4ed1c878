"""Heads against transformers and peft: trained here, opened there, equal outputs; and opened here again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import run, steps, tuned
from tests.tiny import make_config, write_jsonl

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ROWS = {
    "classification": [{"text": f"the fox eats {b}", "label": b} for b in ("berries", "mice", "grass")] * 4,
    "regression": [{"text": f"{i} + 1 =", "label": i / 4} for i in range(8)],
    "token_classification": [
        {"tokens": ["the", "fox", "eats", f"{i}"], "tags": ["O", "B-animal", "I-animal", "B-food"]} for i in range(8)
    ],
    "qa": [
        {"context": f"the fox eats {i} berries", "question": "who eats?",
         "answers": {"text": ["fox"], "answer_start": [4]} if i % 4 else {"text": [], "answer_start": []}}
        for i in range(8)
    ],
}  # fmt: skip
FORMAT = {"span_qa": "qa"}
AUTO = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "span_qa": "AutoModelForQuestionAnswering",
}


def trained(model, objective, folder, name="run", **more):
    kind = FORMAT.get(objective, objective)
    data = write_jsonl(folder / f"{objective}.jsonl", ROWS[kind])
    c = make_config(
        model, data, folder / name, objective=objective, data__format=kind, data__validation=4, train__steps=3, **more
    )
    return run.train(c)


def theirs(model, ids, objective):
    with torch.no_grad():
        out = model.eval()(torch.tensor(ids))
    if objective == "span_qa":
        return torch.stack([out.start_logits, out.end_logits], -1).numpy()
    return out.logits.numpy()


def ours(opened, ids, objective):
    ids_BT = jnp.array(ids)
    position_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
    with jax.set_mesh(opened.mesh):
        outputs = opened.blueprint.model.apply({"params": opened.weights}, ids_BT, jnp.ones_like(ids_BT), position_BT)[
            0
        ]
        logits_BTC = np.asarray(outputs.logits())
    return logits_BTC if objective in ("token_classification", "span_qa") else logits_BTC[:, -1]


@pytest.mark.parametrize("objective", list(AUTO))
def test_whole_models_open_in_transformers(tiny, tmp_path, objective):
    folder = trained(tiny, objective, tmp_path, tuning__method="full")
    opened = tuned.open_model(str(folder))
    model = getattr(transformers, AUTO[objective]).from_pretrained(folder / "export")
    ids = [opened.tokenizer("the fox eats berries").input_ids, opened.tokenizer("the fox eats mice 12").input_ids]
    n = min(map(len, ids))
    ids = [x[:n] for x in ids]
    np.testing.assert_allclose(ours(opened, ids, objective), theirs(model, ids, objective), atol=1e-4)
    head = opened.blueprint.decoder.task
    assert head.kind == objective
    if objective != "span_qa":
        assert [model.config.id2label[i] for i in range(head.size)] == list(head.labels)
    if objective == "classification":  # the last token before the padding speaks
        assert model.config.problem_type == "single_label_classification"
        padded = [[*ids[0], *[model.config.pad_token_id] * 3], [*ids[1], *ids[1][:3]]]
        np.testing.assert_allclose(theirs(model, padded, objective)[:1], ours(opened, ids, objective)[:1], atol=1e-4)


@pytest.mark.parametrize("objective", ["classification", "span_qa"])
def test_adapters_bring_their_head_to_peft(tiny, tmp_path, objective):
    folder = trained(tiny, objective, tmp_path, tuning__rank=4)
    opened = tuned.open_model(str(folder))
    head = opened.blueprint.decoder.task
    said = json.loads((folder / "export" / "adapter_config.json").read_text())
    assert said["modules_to_save"] == [head.module]
    size = {} if objective == "span_qa" else {"num_labels": head.size}
    base = getattr(transformers, AUTO[objective]).from_pretrained(tiny, **size)
    if objective == "span_qa":  # transformers names LLaMA's body otherwise there, and would leave it random
        base.transformer.load_state_dict(transformers.AutoModel.from_pretrained(tiny).state_dict())
    model = peft.PeftModel.from_pretrained(base, folder / "export")
    ids = [opened.tokenizer("the fox eats berries").input_ids]
    np.testing.assert_allclose(ours(opened, ids, objective), theirs(model, ids, objective), atol=1e-4)
    whole = tmp_path / "whole"
    from jaxtune import convert

    convert.write_model(str(folder), whole)
    merged = getattr(transformers, AUTO[objective]).from_pretrained(whole)
    np.testing.assert_allclose(theirs(merged, ids, objective), theirs(model, ids, objective), atol=1e-4)


@pytest.mark.parametrize(("pad", "wanted"), [("<unk>", 0), (None, 2)])
def test_the_config_pads_as_the_tokenizer_does(tiny, tmp_path, pad, wanted):
    """Where the config of the base names no padding: transformers looks for the last token that is none."""
    import shutil

    from jaxtune import blueprint
    from jaxtune.models import families
    from jaxtune.models.heads import TaskHead

    shutil.copytree(tiny, tmp_path / "m")
    file = tmp_path / "m" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | ({"pad_token": pad} if pad else {})))
    hf = blueprint.read_config(tmp_path / "m")
    decoder = dataclasses.replace(families.from_hf(hf), task=TaskHead("classification", ("a", "b")), tied=False)
    blueprint.write_config(tmp_path / "m", hf, decoder)
    assert blueprint.read_config(tmp_path / "m")["pad_token_id"] == wanted


def test_a_head_is_gone_on_from_and_left(tiny, tmp_path):
    """A folder with a head trains on under the same labels, gets a fresh one under others, and none under sft."""
    folder = trained(tiny, "classification", tmp_path, tuning__method="full") / "export"
    before = tuned.open_model(str(folder))
    again = tuned.draw(folder, None, before.mesh)
    assert again.decoder.task.labels == ("berries", "grass", "mice")
    other = trained(folder, "regression", tmp_path, "b", tuning__method="freeze", tuning__last=1)
    assert tuned.open_model(str(other)).blueprint.decoder.task.kind == "regression"
    data = write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "1 + 1 =", "completion": " 2"}] * 8)
    plain = run.train(make_config(folder, data, tmp_path / "c", train__steps=2))
    assert tuned.open_model(str(plain)).blueprint.decoder.task is None


def test_losses_are_those_of_transformers(tiny, tmp_path):
    """The loss of a batch is that of transformers' own loss functions, texts packed in rows here, padded there."""
    from jaxtune import evaluate
    from jaxtune.objectives import OBJECTIVES

    for objective in AUTO:
        kind = FORMAT.get(objective, objective)
        data = write_jsonl(tmp_path / f"{objective}.jsonl", ROWS[kind][:6])
        c = make_config(tiny, data, tmp_path / objective, objective=objective, data__format=kind, train__steps=1)
        folder = run.train(c.model_copy(update={"optim": c.optim.model_copy(update={"learning_rate": 1e-12})}))
        opened = tuned.open_model(str(folder))
        from jaxtune.data import pipeline

        prepared = pipeline.prepare(c.data, opened.tokenizer, 0, objective)
        model = opened.blueprint.model

        def apply(weights, batch, model=model):
            return model.apply({"params": weights}, batch["ids_BT"], batch["segment_BT"], batch["position_BT"])[0]

        with jax.set_mesh(opened.mesh):
            sums = jax.jit(evaluate.make_sums(apply, OBJECTIVES[objective]))
            loss = evaluate.scores(sums, opened.weights, prepared.train, 2, steps.putter(opened.mesh, None))["loss"]
        base = getattr(transformers, AUTO[objective])
        from jaxtune import convert

        convert.write_model(str(folder), tmp_path / f"{objective}-whole")
        their = base.from_pretrained(tmp_path / f"{objective}-whole").eval()
        losses, weights = [], []
        for e in prepared.train.examples:
            ids, columns = torch.tensor([e.ids.tolist()]), {k: torch.tensor(v) for k, v in e.columns.items()}
            if objective == "span_qa":
                with torch.no_grad():
                    out = their(ids)
                open_ = torch.tensor(e.mask)[None]
                masked = [x.masked_fill(~open_, -1e30) for x in (out.start_logits, out.end_logits)]
                ends = [columns["start_S"], columns["end_S"]]
                found = [
                    torch.nn.functional.cross_entropy(x, t[None].long()) for x, t in zip(masked, ends, strict=True)
                ]
                losses.append(float(sum(found)) / 2)
                weights.append(1)
                continue
            if objective == "token_classification":
                labels = torch.where(torch.tensor(e.mask), columns["label_T"], -100)[None].long()
                weights.append(int(e.mask.sum()))
            else:
                labels = columns["label_S"][None] if objective == "regression" else columns["label_S"][None].long()
                weights.append(1)
            with torch.no_grad():
                losses.append(float(their(ids, labels=labels).loss))
        np.testing.assert_allclose(loss, np.average(losses, weights=weights), rtol=1e-4)
