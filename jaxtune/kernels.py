"""The kernels of attention, chosen once for a run, and how each device works on its own part of a batch.

XLA runs anywhere; splash is a flash attention for TPUs that skips blocks of scores which no query sees; cuDNN's is for
GPUs (FlashAttention, Dao et al., 2022, https://arxiv.org/abs/2205.14135). All see the same keys: causal, of their own
segment, within the layer's window.

Where the mesh splits rows along their length (axis `context`), a device has its part of the queries and gathers the
keys and values of all parts; their gradients are summed back into the parts. The parts are contiguous, so under the
causal mask the last device does nearly all of the work on scores, the first nearly none.

Dimensions: B batch, T time of the queries, S time of the keys, N query heads, K key/value heads, H head dim.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune import attention
from jaxtune.attention import Scores
from jaxtune.errors import UserError
from jaxtune.layers import BATCH_AXES, time_axis
from jaxtune.weights import Array

_ALL = 2**30  # a window that is none
_LANES = 128  # blocks of splash are multiples of this
_BLOCKS = (512, 384, 256)  # of queries and of keys, in longer rows


class Kernel(NamedTuple):
    """The kernel of attention, and why it is not the one that is made for the device; empty where it is."""

    name: str  # xla · splash · cudnn
    why: str = ""


def kind(asked: str, device: Any, head: int, dtype: str, softcap: float = 0.0, past: bool = False) -> Kernel:
    """The kernel for a kind of device: the one asked for, or with "auto" the fastest that runs.

    Args:
      asked: "auto", "xla", "splash" or "cudnn".
      device: that is compiled for, of `jax.Device`'s form; it need not be here.
      head: H, the size of a head.
      dtype: of queries, keys and values.
      softcap: the bound of scores; 0 is none.
      past: whether a prefix stands before every text.

    Raises:
      UserError: the kernel asked for cannot run.
    """
    lacks = {
        "xla": "",
        "splash": _splash_lacks(device),
        "cudnn": _cudnn_lacks(device, head, dtype, softcap),
    }
    if past:
        lacks |= dict.fromkeys(("splash", "cudnn"), "a prefix stands in every layer's past, which only xla reads")
    if asked != "auto":
        if lacks[asked]:
            raise UserError(f"train.attention={asked}: {lacks[asked]}; take auto or xla")
        return Kernel(asked)
    made_for = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn", "rocm": "cudnn"}.get(device.platform, "xla")
    if made_for == "splash" and dtype == "float32":
        lacks["splash"] = "splash multiplies float32 in fewer bits"
    return Kernel("xla", lacks[made_for]) if lacks[made_for] else Kernel(made_for)


def _splash_lacks(device: Any) -> str:
    return "" if device.platform == "tpu" else f"splash runs on TPUs, and this is compiled for {device.platform}"


def _cudnn_lacks(device: Any, head: int, dtype: str, softcap: float) -> str:
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform not in ("gpu", "cuda") or not capability[:1].isdigit():
        return f"cudnn runs on GPUs of NVIDIA, and this is compiled for {device.platform}"
    if float(capability) < 8:
        return f"cudnn needs compute capability 8.0 (Ampere), and the GPU has {capability}"
    if dtype not in ("bfloat16", "float16"):
        return f"cudnn computes in bfloat16 or float16, and train.compute_dtype is {dtype}"
    if head % 8 or head > 128:
        return f"cudnn has heads of a multiple of 8 up to 128, and the model's are of {head}"
    return "cudnn has no bound on scores, and the model has" if softcap else ""


def attend(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    segment_BT: Array,
    scores: Scores,
    window: Array | int,
    windows: Sequence[int] = (),
    kernel: str = "xla",
    interpret: bool = False,
) -> Array:
    """As `attention.attend`, by a kernel, each device of the mesh on its own rows, heads and part of the time.

    Args:
      q_BTNH: queries; as the others, whole arrays or those that GSPMD splits.
      k_BTKH: keys.
      v_BTKH: values.
      segment_BT: int32; 0 is padding.
      scores: how scores are made.
      window: how many keys a query sees, 0 for all. A layer of a scan has its own, an array.
      windows: those that an array may be of.
      kernel: the name, see `kind`.
      interpret: run splash without a TPU, slowly.

    Returns: `[B, T, N, H]` in the values' dtype.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = mesh.shape.get("context", 1)
    if kernel == "xla" and time_axis(q_BTNH.shape[1]) is None:
        return attention.attend(q_BTNH, k_BTKH, v_BTKH, segment_BT, scores, window)
    if kernel != "splash":
        make = _cudnn if kernel == "cudnn" else _xla
        return _spread(functools.partial(make, scores), q_BTNH, k_BTKH, v_BTKH, segment_BT, jnp.asarray(window))
    T, block = q_BTNH.shape[1], _block(-(-q_BTNH.shape[1] // parts))
    q_BTNH, k_BTKH, v_BTKH, segment_BT = (
        jnp.pad(x, [(0, 0), (0, -T % (block * parts)), *[(0, 0)] * (x.ndim - 2)])
        for x in (q_BTNH * scores.factor(q_BTNH.shape[-1]), k_BTKH, v_BTKH, segment_BT)
    )
    sizes = sorted({w or _ALL for w in ([window] if isinstance(window, int) else windows)})
    which = jnp.int32(0) if len(sizes) == 1 else jnp.searchsorted(jnp.array(sizes), window).astype(jnp.int32)
    heads = q_BTNH.shape[2] // (_head_shards(mesh, q_BTNH.shape[2]) or 1)
    made = [_splash_kernel(q_BTNH.shape[1], heads, size, block, parts, scores.softcap, interpret) for size in sizes]
    return _spread(_splash, q_BTNH, k_BTKH, v_BTKH, segment_BT, which, made)[:, :T]


def _head_shards(mesh: Any, heads: int) -> int:
    """Over how many devices heads are split; 0 where they are not."""
    split = mesh.shape.get("tensor", 1)
    return split if split > 1 and heads % split == 0 else 0


Local = Callable[..., Array]


def _spread(
    local: Local, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_BT: Array, which: Array, made: Sequence[Any] = ()
) -> Array:
    """`local(q, k, v, segment_BT, segment_BS, offset, which, made)` on each device's part, the keys those of all time.

    `made` are kernels that know which blocks a part of the time sees.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(q_BTNH, k_BTKH, v_BTKH, segment_BT, segment_BT, 0, which, made)
    axes = tuple(a for a in BATCH_AXES if a in mesh.axis_names)
    rows = None if q_BTNH.shape[0] % math.prod(mesh.shape[a] for a in axes) else axes
    time = time_axis(q_BTNH.shape[1])
    shards = _head_shards(mesh, q_BTNH.shape[2])
    heads = "tensor" if shards else None
    if shards and (fewer := k_BTKH.shape[2]) % shards:  # each device gets the keys that its queries share
        copies = math.lcm(fewer, shards) // fewer
        k_BTKH, v_BTKH = (jnp.repeat(x, copies, axis=2) for x in (k_BTKH, v_BTKH))

    def own(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_BT: Array, which: Array, made: Sequence[Any]) -> Array:
        segment_BS: Array = segment_BT
        offset: Any = 0
        if time is not None:
            gather = functools.partial(jax.lax.all_gather, axis_name=time, axis=1, tiled=True)
            k_BTKH, v_BTKH, segment_BS = gather(k_BTKH), gather(v_BTKH), gather(segment_BT)
            offset = jax.lax.axis_index(time) * q_BTNH.shape[1]
        return local(q_BTNH, k_BTKH, v_BTKH, segment_BT, segment_BS, offset, which, made)

    by_time = NamedSharding(mesh, PartitionSpec(None, time))
    split, whole = PartitionSpec(rows, time, heads), PartitionSpec()
    specs = (split, split, split, PartitionSpec(rows, time), whole, [k.manual_sharding_spec(by_time) for k in made])
    return jax.shard_map(own, in_specs=specs, out_specs=split, check_vma=False)(
        q_BTNH, k_BTKH, v_BTKH, segment_BT, which, list(made)
    )


def _xla(
    scores: Scores,
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segment_BT: Array,
    segment_BS: Array,
    offset: Any,
    window: Array,
    _: Any,
) -> Array:
    window, keys = jnp.where(window, window, _ALL), (k_BSKH, v_BSKH)
    return attention.attend(q_BTNH, *keys, segment_BT, scores, window, segment_BS=segment_BS, offset=offset)


# --- splash -----------------------------------------------------------------------------------------------------------


def _block(T: int) -> int:
    """The size of a block for so many queries: one block for short rows, else what adds the least padding.

    >>> _block(100), _block(512), _block(640), _block(8192)
    (128, 512, 384, 512)
    """
    if max(_BLOCKS) >= T:
        return -(-T // _LANES) * _LANES
    return min(_BLOCKS, key=lambda b: (-(-T // b) * b, -b))


def _splash_kernel(T: int, heads: int, window: int, block: int, parts: int, softcap: float, interpret: bool) -> Any:
    """The kernel for rows of a length, of which a device has one of `parts`; a pytree."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    mask: Any = splash_attention_mask.CausalMask((T, T), shard_count=parts)
    if window < T:
        mask = splash_attention_mask.LocalMask((T, T), (window - 1, 0), 0, shard_count=parts)
    keys = block  # fetched together; of long rows two blocks, which are multiplied one after the other
    if block == max(_BLOCKS) and T % (2 * block) == 0 and window >= 2 * block:
        keys = 2 * block
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=keys, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=keys, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=keys,
    )  # fmt: skip
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=parts,
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )


def _splash(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, segment_BT: Array, segment_BS: Array, _: Any, which: Array, made: Any
) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    def run(kernel: Any) -> Array:
        by_head = (x.transpose(0, 2, 1, 3) for x in (q_BTNH, k_BSKH, v_BSKH))
        return jax.vmap(kernel)(*by_head, SegmentIds(segment_BT, segment_BS)).transpose(0, 2, 1, 3)

    return run(made[0]) if len(made) == 1 else jax.lax.switch(which, [functools.partial(run, k) for k in made])


# --- cuDNN ------------------------------------------------------------------------------------------------------------


def _cudnn(
    scores: Scores,
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segment_BT: Array,
    segment_BS: Array,
    offset: Any,
    window: Array,
    _: Any,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> Array:
    """Segments and window are a mask of `[B, 1, T, S]`, which JAX hands to cuDNN as a bias of the queries' dtype: it
    knows of no other way to tell segments apart. Memory so grows with T², though without a factor of heads: at 8,192
    tokens a row's bias takes 128 MiB."""
    behind_TS = offset + jnp.arange(q_BTNH.shape[1])[:, None] - jnp.arange(k_BSKH.shape[1])
    seen_TS = (behind_TS >= 0) & (behind_TS < jnp.where(window, window, _ALL))
    mask_B1TS = (seen_TS & (segment_BT[:, :, None] == segment_BS[:, None]))[:, None]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS, scale=scores.factor(q_BTNH.shape[-1]),
        is_causal=isinstance(offset, int), implementation=implementation,
    )  # fmt: skip
