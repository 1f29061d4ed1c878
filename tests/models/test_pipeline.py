import jax
import jax.numpy as jnp
import pytest

from jaxtune.errors import UserError
from jaxtune.models import pipeline


@pytest.mark.parametrize(
    ("stages", "layers", "groups", "experts", "said"),
    [
        (4, 6, 1, 0, "6 layers do not divide over the stages; mesh.stage=3 would"),
        (2, 4, 2, 0, "make 2 groups"),
        (2, 4, 1, 8, "take mesh.expert"),
    ],
)
def test_what_a_pipeline_cannot_hold_is_said(stages, layers, groups, experts, said):
    with pytest.raises(UserError, match=rf"mesh.stage={stages}: .*{said}"):
        pipeline.check(stages, layers, groups, experts)


def test_one_stage_is_no_pipeline():
    pipeline.check(1, 6, 1, 0)
    assert pipeline.stages() == 1


def test_dropout_is_another_in_every_micro_batch():
    """A stage of one device: rows that are alike get masks of their own."""
    mesh = jax.make_mesh((1,), ("stage",), axis_types=(jax.sharding.AxisType.Auto,))

    def layer(key, x_bTD, own, rest_b):
        return x_bTD + jax.random.normal(key, x_bTD.shape)

    with jax.set_mesh(mesh):
        keys = jax.random.split(jax.random.key(0), 2)
        x_BTD = jax.jit(pipeline.run, static_argnums=0)(layer, keys, jnp.zeros((4, 2, 3)), None, None)
    assert len({float(x) for x in x_BTD[:, 0, 0]}) == 4
