"""What is seen inside of a model is what transformers shows, whole or layer by layer."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import tuned
from jaxtune.compress.calibrate import through
from jaxtune.models.inside import Layers, look

torch = pytest.importorskip("torch")

from tests.parity import families  # noqa: E402 - needs torch


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_inside_is_what_transformers_shows(tmp_path: Path, name: str) -> None:
    theirs = families.write(tmp_path, name)
    theirs.set_attn_implementation("eager")
    m = tuned.open_model(str(tmp_path))
    c, w = m.blueprint.decoder, m.weights
    ids_BT = np.random.default_rng(0).integers(3, 250, (2, 24))
    position_BT = np.broadcast_to(np.arange(24), (2, 24))
    batch = {"ids_BT": jnp.array(ids_BT), "segment_BT": jnp.ones((2, 24), int), "position_BT": jnp.array(position_BT)}
    with torch.no_grad():
        shown = theirs(torch.tensor(ids_BT), output_hidden_states=True, output_attentions=True)
    outputs, inside = jax.jit(lambda w, b: look(c, w, b))(w, batch)
    for i in range(c.layers):
        np.testing.assert_allclose(inside.p_LBNTS[i], shown.attentions[i], atol=2e-5)
        if i + 1 < c.layers:  # transformers' last is behind the last norm
            np.testing.assert_allclose(inside.hidden_LBTD[i], shown.hidden_states[i + 1], atol=2e-4)
    np.testing.assert_allclose(outputs.logits(), shown.logits, atol=2e-4)

    layers = Layers(c)
    x_BTD, layer = layers.first(w, batch), jax.jit(layers.layer)
    for i in range(c.layers):
        x_BTD, inputs = layer(i, layers.one(w, i), x_BTD, batch)
        np.testing.assert_allclose(x_BTD, inside.hidden_LBTD[i], atol=2e-5)
        assert set(inputs) == set(inside.inputs)
        for n, x in inputs.items():
            np.testing.assert_allclose(x, inside.inputs[n][i], atol=2e-5)
    np.testing.assert_allclose(layers.last(w, x_BTD), outputs.logits(), atol=2e-5)

    def halve_the_first(i: int, layer: dict, stats: dict) -> dict:
        if i == 1:  # sees what the halved first layer gives
            seen.append(np.asarray(stats["mlp/up_proj"].gram_II))
        return jax.tree.map(lambda x: x / 2, layer) if i == 0 else layer

    seen: list[np.ndarray] = []
    changed = through(c, w, [batch, batch], halve_the_first)
    x_MI = np.asarray(look(c, changed, batch)[1].inputs["mlp/up_proj"][1], np.float64).reshape(48, -1)
    np.testing.assert_allclose(seen[0], 2 * x_MI.T @ x_MI, rtol=1e-3, atol=1e-3)
