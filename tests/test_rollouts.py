"""Answers of the student in the place of the data's. B rows, T time."""

import numpy as np

from jaxtune import rollouts
from jaxtune.data.batches import Batch
from jaxtune.generate import Generation
from jaxtune.objectives.distill import OWN
from jaxtune.rollouts import Turn


def batch():
    columns = {
        "ids_BT": [[5, 6, 7, 8, 9, 1, 2, 3, 0], [4, 4, 4, 4, 4, 4, 4, 0, 0]],
        "loss_mask_BT": [[0, 0, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1, 0, 0]],
        "segment_BT": [[1, 1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 0, 0]],
        "position_BT": [[0, 1, 2, 3, 4, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 6, 0, 0]],
    }
    return Batch({k: np.array(v, np.int32) for k, v in columns.items()}, np.arange(2))


def test_prompts_end_where_training_begins():
    """A text that is trained on from its first token has no prompt; of documents the first half is one."""
    assert rollouts.turns(batch().columns, False) == [Turn(0, 0, 2, 5), Turn(1, 0, 5, 7)]
    assert rollouts.turns(batch().columns, True) == [Turn(0, 0, 2, 5), Turn(0, 5, 6, 8), Turn(1, 0, 3, 7)]


def test_answers_stand_in_the_datas_place():
    b = batch()
    found = rollouts.turns(b.columns, False)
    made = [Generation("", [21], "stop", []), Generation("", [22, 23, 24], "length", [])]
    new = rollouts.replaced(b, found, made, end=1).columns
    assert new["ids_BT"].tolist() == [[5, 6, 21, 1, 0, 1, 2, 3, 0], [4, 4, 4, 4, 4, 22, 23, 0, 0]]
    assert new["segment_BT"].tolist() == [[1, 1, 1, 1, 0, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 0, 0]]
    assert new["position_BT"][0].tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 0]
    assert new["loss_mask_BT"].tolist() == [
        [0, 0, OWN, OWN, 0, OWN, OWN, OWN, 0], [0, 0, 0, 0, 0, OWN, OWN, 0, 0]
    ]  # fmt: skip
    assert b.columns["loss_mask_BT"].max() == 1


def test_the_share_of_steps_is_spread_and_exact():
    for share in (0.0, 0.1, 1 / 3, 0.75, 1.0):
        assert sum(rollouts.is_own(n, share) for n in range(1, 121)) == round(120 * share)
