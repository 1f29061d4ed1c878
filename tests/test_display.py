"""What notebooks are given: a live curve, the verbs as a magic, a run's picture."""

import re

import pytest

import jaxtune
from jaxtune import display, log, tuned
from jaxtune.errors import Interrupted


class Shell:
    """As much of IPython's as the magic asks for."""

    def register_magic_function(self, magic):
        self.magic = magic

    def set_custom_exc(self, kinds, handler):
        self.kinds, self.handler = kinds, handler

    def _showtraceback(self, kind, error, lines):
        self.shown = lines


@pytest.fixture
def shell():
    made = Shell()
    jaxtune.load_ipython_extension(made)
    return made


def test_the_magic_is_the_verbs(shell, capsys):
    assert shell.magic.__name__ == "jaxtune"
    shell.magic("recipes ls")
    assert "quickstart" in capsys.readouterr().out
    shell.magic("train --help")
    assert "key=value" in capsys.readouterr().out.lower()


def test_an_error_of_the_magic_is_one_line(shell):
    with pytest.raises(jaxtune.UserError) as e:
        shell.magic("train model=demo 'data.train=no such\nfile.jsonl'")
    assert isinstance(e.value, shell.kinds)
    assert shell.handler(shell, e.type, e.value, None) == shell.shown
    [line] = shell.shown
    assert line.startswith("error: ")
    assert "\n" not in line


@pytest.mark.parametrize("line", ["train --nonsense", "no_such_verb"])
def test_a_verb_that_is_called_wrongly_is_one_line(shell, line):
    with pytest.raises(Exception, match="No such") as e:
        shell.magic(line)
    assert isinstance(e.value, shell.kinds)
    shell.handler(shell, e.type, e.value, None)
    assert shell.shown[0].startswith("error: No such")


def test_a_run_that_is_stopped_is_one_line(shell):
    stopped = Interrupted("runs/a: stopped after step 3 and saved")
    assert isinstance(stopped, shell.kinds)
    shell.handler(shell, Interrupted, stopped, None)
    assert shell.shown == ["stopped: runs/a: stopped after step 3 and saved"]


def test_a_curve_has_all_losses_within_its_picture():
    history = [{"step": i, "loss": 3.0 / i} for i in range(1, 21)]
    history += [{"step": 5, "eval_loss": 9.0}, {"step": 20, "eval_loss": float("nan")}]
    svg = display.curve(history, 20)
    points = re.search(r'points="([^"]*)"', svg)[1].split()
    assert len(points) == 20
    assert svg.count("<circle") == 1  # what is not finite is left out
    places = [tuple(map(float, p.split(","))) for p in points]
    assert all(0 <= x <= 560 and 0 <= y <= 120 for x, y in places)
    assert [y for _, y in places] == sorted(y for _, y in places)  # losses that fall go down the page
    assert display.curve(history[:1], 20) == ""


def test_outside_of_a_notebook_lines_are_plain(tmp_path, capsys):
    assert not display.in_notebook()
    run = log.RunLog(tmp_path, 0, 2)
    run.step(1, {"loss": 2.0}, 10, write=True)
    run.close()
    assert "step 1/2  loss 2.0000" in capsys.readouterr().out
    assert tuned.Run(tmp_path)._repr_png_() == (tmp_path / "loss.png").read_bytes()


def test_in_a_notebook_the_curve_is_drawn_anew_in_place(tmp_path, capsys, monkeypatch):
    drawn = []

    class Live(display.Live):
        def __init__(self, total):
            self.total, self._html, self._drawn, self._handle = total, str, 0.0, self

        def update(self, html):
            drawn.append(html)

    monkeypatch.setattr(display, "in_notebook", lambda: True)
    monkeypatch.setattr(display, "Live", Live)
    run = log.RunLog(tmp_path, 0, 3)
    for n in (1, 2, 3):
        run.step(n, {"loss": 1.0 / n}, 10, write=True)
    run.close()
    assert "step 1/3" not in capsys.readouterr().out
    assert '<progress value="3" max="3"' in drawn[-1]
    assert "<polyline" in drawn[-1]
