import os
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import checkpoint, config, manifest
from jaxtune.checkpoint import Checkpoints, flat, start_step, unflat
from jaxtune.errors import UserError
from jaxtune.nodes.lora import LoRA
from tools.faults import damage


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


def saved(folder, *steps, **options):
    c = Checkpoints(folder, **options)
    for n in steps:
        c.save(n, state(n), {"next": n}, ABOUT)
        c.wait()
    return c


def harm(step):
    """Flip a bit of the largest file of a step, which Orbax does not see."""
    file = max((f for f in (step / "state").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_a_damaged_step_is_named_and_left_out_for_the_one_before(tmp_path, capsys):
    saved(tmp_path, 1, 2, 3).close()
    harm(tmp_path / "3")
    (tmp_path / "2" / "manifest.json").unlink()
    looking = Checkpoints(tmp_path, read_only=True)
    assert looking.newest == 1
    looking.close()
    assert looking.steps == [1, 2, 3]
    c = Checkpoints(tmp_path)
    assert c.newest == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / '3'}: this checkpoint is damaged (" in said
    assert "was changed); it is left out, and that of step 1 is taken" in said
    assert f"{tmp_path / '2'}: this checkpoint is damaged (manifest.json is missing)" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2.bad", "3.bad"]
    c.save(2, state(2), {}, ABOUT)
    c.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "3.bad"]
    c.close()


def test_no_damage_of_any_kind_goes_unseen(tmp_path):
    """Sixty times: a file is changed, cut, swapped or deleted; never is anything restored that was not saved."""
    saved(tmp_path / "whole", 1, 2).close()
    chance, named = random.Random(0), 0
    for i in range(60):
        shutil.copytree(tmp_path / "whole", folder := tmp_path / f"{i}")
        damage(folder / "2", chance)
        c = Checkpoints(folder, read_only=True)
        newest = c.newest
        found, data = c.restore(newest, abstract(state(0)))
        jax.tree.map(np.testing.assert_array_equal, found, state(newest))
        assert data == {"next": newest}
        named += newest == 1
        c.close()
    assert named == 60


def test_all_damaged_is_an_error_every_time(tmp_path):
    saved(tmp_path, 1, 2).close()
    harm(tmp_path / "1")
    (tmp_path / "2" / "manifest.json").write_text("{")
    for _ in range(2):
        c = Checkpoints(tmp_path)
        with pytest.raises(
            UserError, match=r"every checkpoint is damaged \(2: manifest.json .*; 1: .*changed\); bring"
        ):
            start_step(config.Config(), c, ABOUT)
        c.close()


def test_a_step_in_the_place_of_another_is_seen(tmp_path, capsys):
    saved(tmp_path, 1, 2).close()
    (tmp_path / "1").rename(tmp_path / "5")
    c = Checkpoints(tmp_path)
    assert c.newest == 2
    assert "damaged (it is that of step 1)" in capsys.readouterr().err
    c.close()


def test_old_ones_go_only_when_a_new_one_is_whole(tmp_path, monkeypatch):
    c = saved(tmp_path, 1, keep=1)
    monkeypatch.setattr("jaxtune.manifest.write", lambda *a: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    c.save(2, state(2), {}, ABOUT)
    with pytest.raises(UserError, match="Input/output error"):
        c.wait()
    assert c.newest == 1
    monkeypatch.undo()
    c.save(3, state(3), {}, ABOUT)
    c.wait()
    assert c.steps == [3]
    c.close()


def test_a_checkpoint_from_before_manifests_still_opens(tmp_path, capsys):
    import orbax.checkpoint as ocp

    old = {k: v for k, v in ABOUT["config"].items() if k != "mesh"}
    old["train"] = {k: v for k, v in old["train"].items() if k not in ("nonfinite", "attention", "matmuls")}
    args = ocp.args
    with ocp.CheckpointManager(tmp_path.resolve()) as manager:
        trees = {name: flat(tree) for name, tree in state(4).items()}
        about = args.JsonSave({**ABOUT, "config": old})
        manager.save(4, args=args.Composite(state=args.StandardSave(trees), data=args.JsonSave({"n": 4}), about=about))
    c = Checkpoints(tmp_path)
    assert start_step(config.Config(), c, ABOUT) == 4
    found, data = c.restore(4, abstract(state(0)))
    jax.tree.map(np.testing.assert_array_equal, found, state(4))
    assert data == {"n": 4}
    assert "was saved before checkpoints had manifests" in capsys.readouterr().err
    c.close()


def test_another_shape_is_refused_by_name(tmp_path):
    c = saved(tmp_path, 1)
    like = abstract({**state(0), "optimiser": (jnp.zeros((2, 3)), {"m": jnp.zeros((4, 3))})})
    with pytest.raises(UserError, match=r"optimiser/0 is \['float32', \[4, 3\]\], not \['float32', \[2, 3\]\]"):
        c.restore(1, like)
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
    (tmp_path / "3.saving.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "1.gone").mkdir()
    owner = Checkpoints(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]
    owner.close()


def unreadable(monkeypatch, step, times):
    """Files of a step give EIO so many times."""
    look, left = manifest._look, [times]

    def failing(file):
        if f"/{step}/" in str(file) and left[0] > 0:
            left[0] -= 1
            raise OSError(5, "Input/output error")
        return look(file)

    monkeypatch.setattr(manifest, "_look", failing)
    monkeypatch.setattr(checkpoint, "_PAUSES", (0.0, 0.0))


def test_what_cannot_be_read_for_a_moment_is_no_damage(tmp_path, monkeypatch):
    saved(tmp_path, 1, 2).close()
    unreadable(monkeypatch, 2, 1)
    c = Checkpoints(tmp_path)
    assert c.newest == 2
    c.close()


def test_what_cannot_be_read_stays_as_it_is(tmp_path, monkeypatch, capsys):
    saved(tmp_path, 1, 3).close()
    unreadable(monkeypatch, 3, 10**6)
    c = Checkpoints(tmp_path, keep=1)
    assert c.newest == 1
    assert f"{tmp_path / '3'}: cannot be read: Input/output error; it is left as it is" in capsys.readouterr().err
    c.save(2, state(2), {}, ABOUT)
    c.wait()
    assert c.steps == [2, 3]
    c.close()
    monkeypatch.undo()
    c = Checkpoints(tmp_path)
    assert c.newest == 3
    c.close()


def test_a_folder_that_cannot_be_listed_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    c = saved(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_PAUSES", (0.0,))
    monkeypatch.setattr(Checkpoints, "steps", property(lambda self: os.listdir("/dev/null/x")))
    with pytest.raises(UserError, match=r"cannot be read \(Not a directory\); mend the storage"):
        _ = c.newest
    monkeypatch.undo()
    assert c.newest == 1
    c.close()


def test_a_step_that_is_saved_again_is_never_away(tmp_path, monkeypatch):
    c = saved(tmp_path, 1)
    replace = os.replace

    def torn(a, b):
        if str(a).endswith("1.saving"):
            raise OSError(5, "Input/output error")
        replace(a, b)

    monkeypatch.setattr("os.replace", torn)
    c.save(1, state(2), {}, ABOUT)
    with pytest.raises(UserError, match="Input/output error"):
        c.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.old", "1.saving"]
    monkeypatch.undo()
    c.close()
    c = Checkpoints(tmp_path)
    assert c.newest == 1
    jax.tree.map(np.testing.assert_array_equal, c.restore(1, abstract(state(0)))[0], state(1))
    c.save(1, state(2), {}, ABOUT)
    c.wait()
    jax.tree.map(np.testing.assert_array_equal, c.restore(1, abstract(state(0)))[0], state(2))
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    c.close()


def test_old_ones_that_cannot_be_deleted_do_no_harm(tmp_path, monkeypatch, capsys):
    c = saved(tmp_path, 1, keep=1)

    def refused(*a, **k):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr("shutil.rmtree", refused)
    c.save(2, state(2), {}, ABOUT)
    c.wait()
    assert c.newest == 2
    assert "old checkpoints cannot be deleted (Device or resource busy); step 2 is whole" in capsys.readouterr().err
    c.close()


def test_a_second_damaged_step_of_a_name_is_put_aside_too(tmp_path):
    saved(tmp_path, 1, 2).close()
    (tmp_path / "2.bad").mkdir()
    (tmp_path / "2.bad" / "x").touch()
    harm(tmp_path / "2")
    c = Checkpoints(tmp_path)
    assert c.newest == 1
    assert not (tmp_path / "2.bad" / "x").exists()
    c.close()
