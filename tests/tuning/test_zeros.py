"""Recovery tuning of a pruned model: its zeros stay, bit by bit, in training, after a kill, and in what is exported."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import job, run, tuned
from jaxtune.config import Lora
from jaxtune.errors import Interrupted, UserError
from jaxtune.hf import files
from jaxtune.nodes.lora import LoRA
from jaxtune.nodes.masked import Masked
from jaxtune.nodes.product import with_products
from jaxtune.tuning.method import Method, leave
from jaxtune.tuning.zeros import keeping
from jaxtune.weights import densify, einsum, grouped, take
from tests.tiny import make_config, write_jsonl, write_tiny

ROWS = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(40)]


def pruned(folder: Path) -> Path:
    """A tiny model of which every other weight of the layers' matrices is zero, in a random pattern."""
    write_tiny(folder)
    file, rng = folder / "model.safetensors", np.random.default_rng(0)
    entries = {}
    for name, t in files.read_header(file).items():
        x = np.array(t.open())
        if "_proj" in name:
            x *= rng.random(x.shape) < 0.5
        entries[name] = files.Entry(x.shape, x.dtype, lambda x=x: x)
    files.write(file, entries)
    return folder


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {n: t.open() for n, t in files.read_header(folder / "model.safetensors").items()}


METHODS: dict[str, dict[str, Any]] = {
    "muon": {"tuning__method": "full", "optim__name": "muon"},  # moves what is masked, too
    "lora": {"tuning__method": "lora", "tuning__rank": 4},
}


@pytest.mark.parametrize("name", list(METHODS))
def test_zeros_stay_and_the_rest_trains(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    base, data = pruned(tmp_path / "base"), write_jsonl(tmp_path / "d.jsonl", ROWS)
    c = make_config(base, data, tmp_path / "run", tuning__keep_zeros=True, data__validation=8, **METHODS[name])
    run.train(c)
    was, now = tensors(base), tensors(tmp_path / "run/export")
    moved = 0
    for n in was:
        if "_proj" in n:
            np.testing.assert_array_equal(was[n] == 0, now[n] == 0, err_msg=n)
            moved += int((was[n] != now[n]).sum())
    assert moved > 1000
    assert "zeros are kept: 5" in capsys.readouterr().out
    held = [m for m in tuned.Run(tmp_path / "run").metrics if "eval_loss" in m][-1]["eval_loss"]
    opened = tuned.open_model(str(tmp_path / "run/export"))
    rows = job.prepare(c).data.validation
    assert rows is not None
    assert opened.scores(rows, 4, "sft")["loss"] == pytest.approx(held, rel=1e-4)


def test_int8_products_are_of_the_masked_weights() -> None:
    w, mask = jax.random.normal(jax.random.key(0), (16, 8)), jax.random.bernoulli(jax.random.key(1), 0.5, (16, 8))
    x = jax.random.normal(jax.random.key(2), (4, 16))
    names = {"layers_0-0": {"mlp": {"up_proj": {"weight": Masked(w, mask)}}}}
    rounded = with_products(names, "int8")["layers_0-0"]["mlp"]["up_proj"]["weight"]
    np.testing.assert_allclose(einsum("bd,df->bf", x, rounded), x @ np.where(mask, w, 0), atol=0.1)


def test_a_killed_run_goes_on_to_the_same_zeros_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, data = pruned(tmp_path / "base"), write_jsonl(tmp_path / "d.jsonl", ROWS)
    keys = {"tuning__method": "full", "tuning__keep_zeros": True, "checkpoint__every": 2, "optim__weight_decay": 0.1}
    run.train(make_config(base, data, tmp_path / "whole", **keys))
    from jaxtune.checkpoint import Checkpoints

    save = Checkpoints.save

    def save_and_die(self: Checkpoints, step: int, *args: Any, **more: Any) -> Any:
        done = save(self, step, *args, **more)
        if step == 4:
            raise Interrupted("killed")
        return done

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(Interrupted):
        run.train(make_config(base, data, tmp_path / "killed", **keys))
    monkeypatch.undo()
    run.train(make_config(base, data, tmp_path / "killed", **keys))
    was, whole, killed = (tensors(tmp_path / f) for f in ("base", "whole/export", "killed/export"))
    for n in whole:
        np.testing.assert_array_equal(whole[n], killed[n], err_msg=n)
        assert "_proj" not in n or ((was[n] == 0) == (whole[n] == 0)).all()


def test_a_masked_node_multiplies_as_the_array_that_it_amounts_to() -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    w, a, b = (jax.random.normal(k, s) for k, s in zip(keys, [(4, 6), (4, 2), (2, 6)], strict=False))
    mask, x = jax.random.bernoulli(keys[3], 0.5, w.shape), jax.random.normal(keys[4], (3, 4))
    for base, whole in ((w, w), (LoRA(w, a, b, scale=0.5), w + 0.5 * a @ b)):
        m, expected = Masked(base, mask), np.where(mask, whole, 0)
        np.testing.assert_allclose(densify(m), expected, rtol=1e-6)
        np.testing.assert_allclose(einsum("bd,df->bf", x, m), x @ expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(take(m, jnp.array([2]), jnp.float32), expected[[2]], rtol=1e-6)
    experts = Masked(w[None], mask[None])
    np.testing.assert_allclose(grouped(experts, x, jnp.array([3])), x @ np.where(mask, w, 0), rtol=1e-5, atol=1e-6)
    grads = jax.grad(lambda m: einsum("bd,df->bf", x, m).sum(), allow_int=True)(Masked(w, mask))
    np.testing.assert_array_equal(np.asarray(grads.whole == 0), ~np.asarray(mask))


@pytest.mark.parametrize(("keys", "words"), [({"base": "nf4"}, "tuning.base"), ({"dropout": 0.1}, "dropout")])
def test_what_does_not_go_with_masks_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        keeping(Method(leave, []), Lora(method="lora", keep_zeros=True, **keys))
