import jax.numpy as jnp
import numpy as np

from jaxtune.explaining import insides
from tests.explaining.test_attributions import ask


def test_the_lens_at_the_last_layer_is_the_model(words):
    q = ask(words, "the fox eats berries", " 3")
    q = q._replace(ids=q.ids[: q.prompt.stop])
    seen = insides.see(words, q)
    p_V = words.outputs(q)
    assert abs(seen.lens.target_L[-1] - p_V[q.target[0]]) < 1e-6
    assert seen.lens.rank_L[-1] == (p_V > p_V[q.target[0]]).sum()
    assert seen.lens.top_LTK[-1, -1, 0] == p_V.argmax()
    np.testing.assert_allclose(seen.lens.p_LTK[-1, -1], np.sort(p_V)[::-1][:3], atol=1e-6)
    assert seen.hidden_LTD.shape == (2, len(q.text.ids), 32)
    whole = insides.activations(words, q.text.ids)
    np.testing.assert_allclose(whole.p_TV[-1], p_V, atol=1e-6)
    np.testing.assert_allclose(whole.hidden_LTD, seen.hidden_LTD, atol=1e-5)


def test_attention_and_rollout_are_shares_of_what_was_before(words):
    seen = insides.see(words, ask(words, "the fox eats berries", " 3"))
    T = len(seen.lens.top_LTK[0])
    for p in (seen.p_LNTS, seen.rollout_LTS):
        np.testing.assert_allclose(p.sum(-1), 1.0, atol=1e-5)
        assert (
            not np.triu(np.ones((T, T)), 1)[None].repeat(p.shape[0], 0)[p.reshape(p.shape[0], -1, T, T)[:, 0] > 0].any()
        )
    mixed = [np.asarray(jnp.asarray(p_NTS).mean(0)) / 2 + np.eye(T) / 2 for p_NTS in seen.p_LNTS]
    np.testing.assert_allclose(seen.rollout_LTS[-1], mixed[1] @ mixed[0], atol=1e-6)
