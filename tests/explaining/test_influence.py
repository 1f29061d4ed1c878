import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import config, optim
from jaxtune.data.batches import Rows
from jaxtune.data.encode import Encoded
from jaxtune.explaining import influence
from jaxtune.explaining.influence import losses
from jaxtune.objectives import OBJECTIVES
from tests.explaining.conftest import WRONG
from tests.explaining.test_attributions import ask


def test_a_wrong_label_is_the_most_harmful_row(classifier, reader):
    found = influence.tracin(classifier, reader, [ask(reader, "fox eats moon", "night")], 1000)
    assert found.total == len(found.rows) == 48
    assert found.score_QN[0].argmin() == WRONG
    assert found.rows.origins[WRONG].endswith(f":{WRONG + 1}")
    moon = np.arange(48) % 2 == 1
    moon[WRONG] = False
    assert found.score_QN[0][moon].mean() > 0
    c = config.load(classifier / "config.yaml")
    rate = optim.schedule(c.optim, 30)
    assert [x.step for x in found.checkpoints] == [10, 20, 30]
    for x in found.checkpoints:
        assert x.rate == pytest.approx(sum(float(rate(i)) for i in range(x.step - 10, x.step)), rel=1e-5)


@pytest.mark.parametrize("objective", ["sft", "classification"])
def test_inner_products_are_those_of_gradients(reader, words, objective):
    r = words if objective == "sft" else reader
    ids_BT = np.random.default_rng(0).integers(3, 250, (2, 16))
    batch = {
        "ids_BT": jnp.array(ids_BT), "segment_BT": jnp.array([[1] * 16, [1] * 12 + [0] * 4]),
        "position_BT": jnp.broadcast_to(jnp.arange(16), (2, 16)), "loss_mask_BT": jnp.ones((2, 16), jnp.int32),
        "last_BS": jnp.array([[15], [11]]), "label_BS": jnp.array([[1], [0]]),
    }  # fmt: skip
    weights, model = r.tuned.weights, r.model

    @jax.jit
    def both(w):
        def one(w):  # the loss that trains, of the second row
            row = {k: x[1:] for k, x in batch.items()}
            out = model.apply({"params": w}, row["ids_BT"], row["segment_BT"], row["position_BT"])[0]
            return OBJECTIVES[objective](out, row)[0]

        value, grad = jax.value_and_grad(one)(w)
        nothing = jax.tree.map(lambda x: None, w)
        dot_B = influence._dots(model, objective, w, nothing, grad, batch)
        return value, losses(model, objective, w, batch), dot_B, sum((x**2).sum() for x in jax.tree.leaves(grad))

    value, value_B, dot_B, square = both(weights)
    assert value_B[1] == pytest.approx(float(value), rel=1e-5)
    assert dot_B[1] == pytest.approx(float(square), rel=1e-3)


def test_a_part_of_many_rows_is_drawn_in_order_and_unpacked():
    examples = [Encoded(np.arange(n + 2, dtype=np.int32), np.ones(n + 2, bool)) for n in range(20)]
    packed = Rows(examples, [f"f:{i}" for i in range(20)], [[*range(20)]], 256)
    rows, total = influence.unpacked(packed, 7, 0)
    assert (len(rows), total) == (7, 20)
    places = [int(o.rpartition(":")[2]) for o in rows.origins]
    assert places == sorted(set(places))
    assert [len(e.ids) - 2 for e in rows.examples] == places
    assert [*map(list, rows.rows)] == [[i] for i in range(7)]
    assert influence.unpacked(packed, 20, 0)[0].origins == packed.origins
