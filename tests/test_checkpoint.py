import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import config
from jaxtune.checkpoint import Checkpoints, flat, start_step, unflat
from jaxtune.errors import UserError
from jaxtune.nodes.lora import LoRA


def state(seed):
    x = jax.random.normal(jax.random.key(seed), (4, 3))
    return {"trainable": {"w": LoRA(None, x, x.T, scale=2.0)}, "step": jnp.int32(seed), "optimiser": (x + 1, {"m": x})}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


ABOUT = {"config": config.Config().model_dump(mode="json"), "data_digest": "a"}


def test_trees_survive_flattening():
    tree = state(3)
    jax.tree.map(np.testing.assert_array_equal, unflat(flat(tree), tree), tree)
    assert "trainable/w/a" in flat(tree)


def test_what_is_saved_is_restored_and_old_ones_go(tmp_path):
    c = Checkpoints(tmp_path, keep=2)
    for n in (1, 2, 3):
        c.save(n, state(n), {"next_index": n}, ABOUT)
    c.wait()
    assert c.newest == 3
    found, data = c.restore(3, abstract(state(0)))
    jax.tree.map(np.testing.assert_array_equal, found, state(3))
    assert data == {"next_index": 3}
    assert c.about(3) == ABOUT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
    c.close()


def test_training_on_does_not_reach_into_a_save(tmp_path):
    """The buffers are given away to the next step while the save goes on behind."""
    c = Checkpoints(tmp_path)
    x = jnp.arange(1_000_000, dtype=jnp.float32)
    want = np.array(x)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    c.save(1, {"trainable": {"x": x}}, {}, {})
    for _ in range(20):
        x = step(x)
    c.wait()
    found, _ = c.restore(1, abstract({"trainable": {"x": x}}))
    np.testing.assert_array_equal(found["trainable"]["x"], want)
    c.close()


def test_where_a_run_starts(tmp_path):
    c = Checkpoints(tmp_path)
    cfg = config.Config()
    assert start_step(cfg, c, ABOUT) == 0
    c.save(5, state(1), {}, ABOUT)
    c.wait()
    assert start_step(cfg, c, ABOUT) == 5
    never = cfg.model_copy(update={"checkpoint": config.Checkpoint(resume="never")})
    with pytest.raises(UserError, match="checkpoint.resume=never; choose another output"):
        start_step(never, c, ABOUT)
    other = {**ABOUT, "config": {**ABOUT["config"], "train": {**ABOUT["config"]["train"], "seed": 9, "log_every": 3}}}
    with pytest.raises(UserError, match=r"differs in train.seed \(0 there, 9 now\); choose"):
        start_step(cfg, c, other)
    with pytest.raises(UserError, match=r"differs in data_digest \(a there, b now\)"):
        start_step(cfg, c, {**ABOUT, "data_digest": "b"})
    c.close()


def test_a_damaged_checkpoint_is_named(tmp_path):
    c = Checkpoints(tmp_path)
    c.save(1, state(1), {}, ABOUT)
    c.wait()
    for f in (tmp_path / "1" / "about").rglob("*"):
        if f.is_file():
            f.unlink()
    with pytest.raises(UserError, match="1: cannot be restored"):
        c.about(1)
    for f in (tmp_path / "1" / "state").rglob("*"):
        if f.is_file():
            f.write_bytes(b"")
    with pytest.raises(UserError, match="1: cannot be restored"):
        c.restore(1, abstract(state(0)))
    c.close()


def test_a_disk_that_cannot_be_written(tmp_path, monkeypatch):
    c = Checkpoints(tmp_path)

    def full(*a, **k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(c._orbax, "save", full)
    with pytest.raises(UserError, match="cannot save a checkpoint .*earlier ones are kept; make room"):
        c.save(1, state(1), {}, ABOUT)


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    c = Checkpoints(tmp_path)
    c.save(1, state(1), {}, ABOUT)
    c.wait()
    monkeypatch.setattr("shutil.disk_usage", lambda p: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match=r"it needs \d+ B, 100 B are free\); earlier ones are kept; make room"):
        c.save(2, state(2), {}, ABOUT)
    assert c.newest == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]
    c.close()


def test_looking_does_not_touch_what_another_process_is_saving(tmp_path):
    c = Checkpoints(tmp_path)
    c.save(1, state(1), {}, ABOUT)
    c.wait()
    c.close()
    half = tmp_path / "2.orbax-checkpoint-tmp"
    half.mkdir()
    looking = Checkpoints(tmp_path, read_only=True)
    assert looking.newest == 1
    assert looking.about(1) == ABOUT
    looking.close()
    assert half.exists()
    owner = Checkpoints(tmp_path)
    deadline = time.monotonic() + 20
    while half.exists() and time.monotonic() < deadline:  # Orbax tidies up in the background
        time.sleep(0.05)
    assert not half.exists()
    owner.close()
