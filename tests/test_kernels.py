"""Attention by each kernel against a float64 reference.

Dimensions: B rows, T time, N query heads, K key/value heads, H head dim."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import kernels
from jaxtune.attention import Scores
from jaxtune.errors import UserError
from tests.tiny import on_eight_devices

CPU, TPU = SimpleNamespace(platform="cpu"), SimpleNamespace(platform="tpu")
AMPERE = SimpleNamespace(platform="gpu", compute_capability="8.0")


def reference(q, k, v, segment, d_o, scale, softcap, window):
    """The output, and the gradients of its product with `d_o`, in float64 NumPy, head by head."""
    q, k, v, d_o = (np.asarray(x, np.float64) for x in (q, k, v, d_o))
    B, T, N, _ = q.shape
    group = N // k.shape[2]
    out, (d_q, d_k, d_v) = np.zeros_like(q), (np.zeros_like(x) for x in (q, k, v))
    behind = np.arange(T)[:, None] - np.arange(T)
    for b in range(B):
        seen = (behind >= 0) & (behind < (window or T)) & (segment[b][:, None] == segment[b])
        for n in range(N):
            at = b, slice(None), n // group
            raw = q[b, :, n] @ k[at].T * scale
            score = np.tanh(raw / softcap) * softcap if softcap else raw
            e = np.where(seen, np.exp(score - np.where(seen, score, -np.inf).max(1, keepdims=True)), 0)
            p = e / e.sum(1, keepdims=True)
            out[b, :, n] = p @ v[at]
            d_p = d_o[b, :, n] @ v[at].T
            d_score = p * (d_p - (d_p * p).sum(1, keepdims=True))
            d_raw = d_score * (1 - (score / softcap) ** 2 if softcap else 1) * scale
            d_q[b, :, n] = d_raw @ k[at]
            d_k[at] += d_raw.T @ q[b, :, n]
            d_v[at] += p.T @ d_o[b, :, n]
    return out, d_q, d_k, d_v


def inputs(B, T, N, K, H):
    rng = np.random.default_rng(0)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)]
    q, k, v, d_o = (rng.normal(size=s).astype(np.float32) for s in shapes)
    segment = np.zeros((B, T), np.int32)  # three texts and padding, otherwise cut in each row
    for b in range(B):
        a, c = T // 3 + 5 * b, T // 2 + 7 * b
        segment[b, :a], segment[b, a:c], segment[b, c : T - 9] = 1, 2, 3
    return q, k, v, segment, d_o


CASES = {
    "packed": ((2, 200, 4, 2, 16), {}, 0),
    "window": ((2, 200, 4, 2, 16), {}, 50),
    "long": ((1, 1020, 1, 1, 8), {}, 0),
    "capped": ((1, 130, 2, 2, 8), {"softcap": 5.0, "scale": 0.7}, 0),
}


def agree(attend, case, tolerance=2e-5):
    shapes, scores, window = CASES[case]
    q, k, v, segment, d_o = inputs(*shapes)
    s = Scores(**scores)
    want = reference(q, k, v, segment, d_o, s.factor(q.shape[-1]), s.softcap, window)

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, segment, s, window), q, k, v)
        return out, *pull(jnp.asarray(d_o))

    for got, expected in zip(run(q, k, v), want, strict=True):
        np.testing.assert_allclose(got, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", ["xla", "splash"])
def test_a_kernel_is_as_the_reference_forward_and_backward(kernel, case):
    agree(functools.partial(kernels.attend, kernel=kernel, interpret=True), case)


@pytest.mark.parametrize("case", ["packed", "window"])
def test_what_cudnn_is_given_makes_the_reference(case):
    """The same call, scale and mask, with JAX's own implementation in its place."""

    def attend(q, k, v, segment, scores, window):
        args = scores, q, k, v, segment, segment, 0, jnp.asarray(window), ()
        return kernels._cudnn(*args, implementation="xla")

    agree(attend, case)


def test_layers_of_one_scan_have_windows_of_their_own():
    q, k, v, segment, _ = inputs(1, 150, 2, 1, 8)

    def scanned(kernel):
        def layer(x, window):
            return x, kernels.attend(q, k, v, segment, Scores(), window, (40, 0), kernel, interpret=True)

        return jax.jit(lambda: jax.lax.scan(layer, 0.0, jnp.array([40, kernels._ALL]))[1])()

    got, want = scanned("splash"), scanned("xla")
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert np.abs(want[0] - want[1]).max() > 0.1


@pytest.mark.parametrize(
    ("asked", "device", "head", "dtype", "softcap", "name", "why"),
    [
        ("auto", TPU, 128, "bfloat16", 30.0, "splash", ""),
        ("auto", TPU, 128, "float32", 0.0, "xla", "fewer bits"),
        ("auto", CPU, 128, "bfloat16", 0.0, "xla", ""),
        ("auto", AMPERE, 128, "bfloat16", 0.0, "cudnn", ""),
        ("auto", AMPERE, 128, "bfloat16", 30.0, "xla", "bound on scores"),
        ("auto", AMPERE, 256, "bfloat16", 0.0, "xla", "up to 128"),
        ("auto", SimpleNamespace(platform="gpu", compute_capability="7.5"), 64, "bfloat16", 0.0, "xla", "Ampere"),
        ("auto", SimpleNamespace(platform="rocm", compute_capability="gfx942"), 64, "bfloat16", 0.0, "xla", "NVIDIA"),
        ("xla", TPU, 128, "bfloat16", 0.0, "xla", ""),
    ],
)
def test_auto_takes_the_fastest_that_runs(asked, device, head, dtype, softcap, name, why):
    found = kernels.kind(asked, device, head, dtype, softcap)
    assert found.name == name
    assert why in found.why if why else not found.why


@pytest.mark.parametrize("asked", ["splash", "cudnn"])
def test_a_kernel_that_cannot_run_is_refused_by_name(asked):
    with pytest.raises(UserError, match=f"train.attention={asked}: .* compiled for cpu; take auto or xla"):
        kernels.kind(asked, CPU, 128, "bfloat16")


def test_a_prefix_is_read_by_xla_alone():
    assert kernels.kind("auto", TPU, 128, "bfloat16", past=True).why.startswith("a prefix stands in every layer's past")
    with pytest.raises(UserError, match="train.attention=splash: a prefix stands"):
        kernels.kind("splash", TPU, 128, "bfloat16", past=True)
    assert kernels.kind("auto", CPU, 128, "bfloat16", past=True) == kernels.Kernel("xla")


SHARDED = """
import functools
import jax, numpy as np
from tests import test_kernels as t
from jaxtune import kernels, sharding
from jaxtune.config import Mesh

for case, sizes, kernel in (
    ("packed", {"context": 4, "tensor": 2}, "xla"),
    ("window", {"context": 4, "fsdp": 2}, "xla"),
    ("packed", {"context": 2, "tensor": 4}, "splash"),
    ("window", {"context": 4, "fsdp": 2}, "splash"),
):
    with jax.set_mesh(sharding.make_mesh(Mesh(**({"fsdp": 1} | sizes)))):
        t.agree(functools.partial(kernels.attend, kernel=kernel, interpret=True), case)
"""


def test_a_mesh_splits_heads_and_time():
    on_eight_devices(SHARDED)
