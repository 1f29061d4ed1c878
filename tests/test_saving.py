"""A disk in trouble: said, tried again, and nothing good is lost."""

import os
import threading

import pytest

from jaxtune import saving
from jaxtune.checkpoint import Checkpoints
from jaxtune.saving import Saver
from tests.test_checkpoint import ABOUT, state


@pytest.fixture
def checkpoints(tmp_path):
    c = Checkpoints(tmp_path / "c")
    yield c
    c.close()


def saves(c, n):
    return lambda: c.save(n, state(n), {"next": n}, ABOUT)


def test_what_fails_at_once_or_behind_is_said_and_tried_again(checkpoints, monkeypatch, capsys):
    s = Saver(checkpoints)
    s.save(1, saves(checkpoints, 1))
    s.settle()
    begin, behind = checkpoints._orbax.save, checkpoints._orbax.check_for_errors

    def full(*a, **k):
        raise OSError(28, "No space left on device")

    def lost():
        raise ValueError("INTERNAL: stale file handle")

    monkeypatch.setattr(checkpoints._orbax, "save", full)
    s.save(2, saves(checkpoints, 2))
    assert s.failures == 1
    assert not s.overdue
    s._next_try = 0.0
    assert s.overdue
    monkeypatch.setattr(checkpoints._orbax, "save", begin)
    monkeypatch.setattr(checkpoints._orbax, "check_for_errors", lost)
    s.save(3, saves(checkpoints, 3))
    s.settle()
    assert s.failures == 2
    assert checkpoints.newest == 1
    monkeypatch.setattr(checkpoints._orbax, "check_for_errors", behind)
    s.save(4, saves(checkpoints, 4))
    assert s.finish(4, saves(checkpoints, 4)) is None
    assert s.failures == 0
    assert checkpoints.steps == [1, 4]
    said = capsys.readouterr().err
    assert "step 2: " in said
    assert "No space left on device); earlier ones are kept; make room; training goes on" in said
    assert "step 3: " in said
    assert "stale file handle" in said


def test_the_last_step_is_tried_for_a_while(checkpoints, monkeypatch):
    slept = []
    begin, left = checkpoints._orbax.save, iter([1, 1, 1])

    def full(*a, **k):
        if next(left, None):
            raise OSError(30, "Read-only file system")
        begin(*a, **k)

    monkeypatch.setattr(checkpoints._orbax, "save", full)
    monkeypatch.setattr(saving.time, "sleep", slept.append)
    s = Saver(checkpoints)
    s.save(5, saves(checkpoints, 5))
    assert s.finish(5, saves(checkpoints, 5)) is None
    assert slept == [5, 10]
    assert checkpoints.newest == 5


def test_what_is_lost_in_the_end_is_named(checkpoints, monkeypatch):
    s = Saver(checkpoints)
    s.save(3, saves(checkpoints, 3))
    s.settle()

    def full(*a, **k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._orbax, "save", full)
    monkeypatch.setattr(saving, "PAUSES", (0,))
    lost = s.finish(6, saves(checkpoints, 6))
    assert "step 6 could not be saved; the newest checkpoint is that of step 3" in str(lost)
    assert checkpoints.newest == 3


def test_a_slow_disk_does_not_hold_the_training(checkpoints, monkeypatch, capsys):
    gate, behind = threading.Event(), checkpoints._orbax.check_for_errors

    def slow():
        gate.wait(30)
        behind()

    monkeypatch.setattr(checkpoints._orbax, "check_for_errors", slow)
    s = Saver(checkpoints)
    s.save(1, saves(checkpoints, 1))
    s.save(2, saves(checkpoints, 2))
    assert "step 2: the save before is still being written, so this one is put off" in capsys.readouterr().err
    assert not s.overdue
    gate.set()
    assert checkpoints.newest == 1  # waits
    assert s.overdue
    assert s.finish(3, saves(checkpoints, 3)) is None
    assert checkpoints.steps == [1, 3]


def test_a_resumed_run_that_has_no_step_left_saves_nothing(checkpoints):
    assert Saver(checkpoints, start=7).finish(7, pytest.fail) is None


def test_where_nothing_can_be_listed_the_end_is_still_an_error_that_says_so(checkpoints, monkeypatch):
    s = Saver(checkpoints)
    monkeypatch.setattr(saving, "PAUSES", ())
    monkeypatch.setattr(Checkpoints, "steps", property(lambda self: os.listdir("/dev/null/x")))
    monkeypatch.setattr(checkpoints._orbax, "save", lambda *a, **k: (_ for _ in ()).throw(OSError(116, "Stale")))
    said = str(s.finish(6, saves(checkpoints, 6)))
    assert "step 6 could not be saved; which one is there cannot be seen (Not a directory)" in said


def test_what_is_not_tried_again_does_not_say_so(checkpoints, monkeypatch, capsys):
    s = Saver(checkpoints, again=False)
    monkeypatch.setattr(checkpoints._orbax, "save", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space")))
    s.save(2, saves(checkpoints, 2))
    assert "No space); earlier ones are kept; make room; training goes on, without it" in capsys.readouterr().err
