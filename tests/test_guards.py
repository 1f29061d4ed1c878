import math

import pytest

from jaxtune.errors import UserError
from jaxtune.guards import IN_A_ROW, Guards, Spikes

NAN = {"loss": math.nan, "grad_norm": 1.0}
FINE = {"loss": 1.0, "grad_norm": 1.0}


def test_a_spike_is_seen_after_the_warm_up_and_does_not_hide_the_next():
    s = Spikes(6.0)
    assert all(s.see(x) is None for x in (9.0, 5.0, 3.0))
    assert all(s.see(2.0 + 0.1 * (n % 3)) is None for n in range(200))
    assert s.see(8.0) > 6
    assert s.see(8.0) > 6
    assert s.see(2.1) is None


def test_noise_and_descent_are_no_spikes():
    s = Spikes(6.0)
    assert not any(s.see(10 / (1 + n / 20) + 0.3 * math.sin(n * n)) for n in range(500))


@pytest.mark.parametrize("kind", ["skip", "rollback"])
def test_so_many_in_a_row_are_a_stop(kind, capsys):
    g = Guards(kind)
    limit = IN_A_ROW[kind]
    assert not any(g.finite(n, NAN, [f"f:{n}"]) for n in range(1, limit))
    assert g.finite(limit, FINE, [])
    assert not any(g.finite(n, {**FINE, "grad_norm": math.inf}, []) for n in range(limit + 1, 2 * limit))
    with pytest.raises(UserError, match=f"{limit} in a row are not left out; the last checkpoint is kept"):
        g.finite(2 * limit, NAN, ["f:9"])
    assert "step 1: loss nan, gradient norm 1.0 on rows f:1; " in capsys.readouterr().err


def test_a_spike_is_said_with_its_rows(capsys):
    g = Guards(spike=5.0)
    assert all(g.spike(n, 2.0 + n % 2, []) is None for n in range(50))
    assert g.spike(51, 40.0, ["f:7", "f:8"]) > 5
    assert "step 51: loss 40.0000 is " in (said := capsys.readouterr().err)
    assert "above its running mean 2.5" in said
    assert "on rows f:7, f:8" in said
    assert Guards(spike=None).spike(1, 1e9, []) is None
