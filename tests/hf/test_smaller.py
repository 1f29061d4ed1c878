"""A model with fewer layers, heads or channels opens in transformers, and is the one that was meant."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import tuned
from jaxtune.errors import UserError
from jaxtune.hf import files, smaller
from jaxtune.models.inside import Layers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.parity import families  # noqa: E402 - needs torch

IDS = np.random.default_rng(0).integers(3, 250, (2, 20))


def entries(folder: Path) -> dict[str, files.Entry]:
    found = files.read_header(folder / "model.safetensors")
    return {n: files.Entry(t.shape, t.dtype, t.open) for n, t in found.items()}


def hf(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def reopened(folder: Path, config: dict, made: smaller.Smaller) -> np.ndarray:
    """The logits of a smaller model as transformers opens it."""
    folder.mkdir()
    files.write_folder(folder, made.tensors)
    (folder / "config.json").write_text(json.dumps({**config, **made.changes}))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return logits(model.eval())


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "mixtral"])
def test_without_a_head_is_with_a_head_that_says_nothing(tmp_path: Path, name: str) -> None:
    model = families.write(tmp_path / "whole", name)
    config = hf(tmp_path / "whole")
    keep = [[1], [0], [1]]  # of two key/value heads
    small = reopened(tmp_path / "small", config, smaller.drop_heads(entries(tmp_path / "whole"), config, keep))
    H = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    half = 2 * H  # two query heads share one
    with torch.no_grad():
        for layer, (kept,) in zip(model.model.layers, keep, strict=True):
            gone = 1 - kept
            layer.self_attn.o_proj.weight[:, gone * half : (gone + 1) * half] = 0
    np.testing.assert_allclose(small, logits(model), atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_without_channels_is_with_channels_that_are_zero(tmp_path: Path, name: str) -> None:
    model = families.write(tmp_path / "whole", name)
    config, rng = hf(tmp_path / "whole"), np.random.default_rng(1)
    keep = [sorted(rng.permutation(48)[:20].tolist()) for _ in range(3)]
    small = reopened(tmp_path / "small", config, smaller.drop_channels(entries(tmp_path / "whole"), config, keep))
    with torch.no_grad():
        for layer, kept in zip(model.model.layers, keep, strict=True):
            layer.mlp.down_proj.weight[:, [i for i in range(48) if i not in kept]] = 0
    np.testing.assert_allclose(small, logits(model), atol=2e-5)


@pytest.mark.parametrize("name", ["gemma3", "smollm3", "qwen2_windows"])
def test_without_a_layer_is_past_the_layer(tmp_path: Path, name: str) -> None:
    families.write(tmp_path / "whole", name)
    config = hf(tmp_path / "whole")
    small = reopened(tmp_path / "small", config, smaller.drop_layers(entries(tmp_path / "whole"), config, [0, 2]))
    m = tuned.open_model(str(tmp_path / "whole"))
    layers, w = Layers(m.blueprint.decoder), m.weights
    batch = {
        "ids_BT": jnp.asarray(IDS), "segment_BT": jnp.ones(IDS.shape, int),
        "position_BT": jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape),
    }  # fmt: skip
    x_BTD, run = layers.first(w, batch), jax.jit(layers.layer)
    for i in (0, 2):
        x_BTD = run(i, layers.one(w, i), x_BTD, batch)[0]
    np.testing.assert_allclose(small, layers.last(w, x_BTD), atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "ministral", "gemma2", "olmo3", "phi4_mini", "granite", "qwen3_moe"])
def test_layers_of_every_kind_are_told_in_the_config(tmp_path: Path, name: str) -> None:
    families.write(tmp_path / "whole", name)
    config = hf(tmp_path / "whole")
    made = smaller.drop_layers(entries(tmp_path / "whole"), config, [1, 2])
    assert np.isfinite(reopened(tmp_path / "small", config, made)).all()
    mine = tmp_path / "whole/model.safetensors"
    for tensor, t in made.tensors.items():
        old = tensor.replace(".layers.1.", ".layers.2.").replace(".layers.0.", ".layers.1.")
        np.testing.assert_array_equal(t.data(), files.read_header(mine)[old].open())


def test_what_a_family_cannot_be_is_refused(tmp_path: Path) -> None:
    families.write(tmp_path / "olmo", "olmo2")
    families.write(tmp_path / "moe", "mixtral")
    families.write(tmp_path / "llama", "llama", num_attention_heads=8, num_key_value_heads=8)
    asked = {"olmo": smaller.drop_heads, "moe": smaller.drop_channels, "llama": smaller.drop_heads}
    words = {"olmo": "normed over all heads", "moe": "experts", "llama": "do not divide hidden_size 32.*do: 1, 2, 4"}
    for name, drop in asked.items():
        with pytest.raises(UserError, match=words[name]):
            drop(entries(tmp_path / name), hf(tmp_path / name), [[0, 1, 2]] * 3)
    with pytest.raises(UserError, match="from 0 to 2"):
        smaller.drop_layers(entries(tmp_path / "llama"), hf(tmp_path / "llama"), [0, 3])
    with pytest.raises(UserError, match="equally long"):
        smaller.drop_channels(entries(tmp_path / "llama"), hf(tmp_path / "llama"), [[0], [1, 2], [3]])
