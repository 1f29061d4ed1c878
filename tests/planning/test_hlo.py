"""HLO is read as the compiler wrote it: products, loops, collectives; texts as TPUs give them, and a step on CPU."""

import json

import jax
import jax.numpy as jnp
import pytest

from jaxtune.planning import hlo, reading
from tests.tiny import on_eight_devices

LOOP = """HloModule m, is_scheduled=true

%cond (p: (u32[], f32[8,4], f32[4,4])) -> pred[] {
  %bound = u32[]{:T(128)} constant(6)
  %p = (u32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, f32[4,4]{1,0:T(8,128)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (p.1: (u32[], f32[8,4], f32[4,4])) -> (u32[], f32[8,4], f32[4,4]) {
  %two = u32[]{:T(128)} constant(2)
  %p.1 = (u32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, f32[4,4]{1,0:T(8,128)}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=0
  %next = u32[]{:T(128)} add(%i.1, %two)
  %x = f32[8,4]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %w = f32[4,4]{1,0:T(8,128)} get-tuple-element(%p.1), index=2
  %gathered = f32[4,4]{1,0:T(8,128)} all-gather(%w), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'b'}
  %again = f32[4,4]{1,0:T(8,128)} all-gather(%w), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'b'}
  %y = f32[8,4]{1,0:T(8,128)} convolution(%x, %again), dim_labels=bf_io->bf
  ROOT %out = (u32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, f32[4,4]{1,0:T(8,128)}) tuple(%next, %y, %w)
}

ENTRY %main (a: f32[8,4], b: f32[4,4]) -> f32[8,4] {
  %zero = u32[]{:T(128)} constant(0)
  %a = f32[8,4]{1,0:T(8,128)} parameter(0)
  %b = f32[4,4]{1,0:T(8,128)} parameter(1)
  %begin = (u32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, f32[4,4]{1,0:T(8,128)}) tuple(%zero, %a, %b)
  %loop = (u32[]{:T(128)}, f32[8,4], f32[4,4]) while(%begin), condition=%cond, body=%body
  ROOT %r = f32[8,4]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_without_a_written_count_goes_round_as_its_counter_says() -> None:
    r = reading.read(LOOP, {"data": 2, "fsdp": 4})
    assert r.flops == {"f32": 3 * 2 * 8 * 4 * 4}  # 0, 2, 4
    assert r.unknown_loops == []
    (gather,) = r.collectives  # one channel is one collective
    assert (gather.kind, gather.axes, gather.size, gather.times) == ("all-gather", ("fsdp",), 4, 3)
    assert gather.sent == 3 * (4 * 4 * 4 * 4) * 3 / 4


KERNEL = """HloModule m, is_scheduled=true

ENTRY %main (q: bf16[2,4,256,64], k: bf16[2,2,256,64], w: bf16[64,64]) -> bf16[2,4,256,64] {
  %q = bf16[2,4,256,64]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[2,2,256,64]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %w = bf16[8,64,64]{2,1,0:T(8,128)(2,1)} parameter(2)
  %m = s8[1,2,2]{2,1,0:T(4,128)(4,1)S(1)} constant({...})
  %splash_mha_fwd.1 = (f32[2,256,128]{2,1,0}, bf16[2,4,256,64]{3,2,1,0:T(8,128)(2,1)}) custom-call(%m, %q, %k, %k), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256}"
}}, metadata={op_name="jit(step)/while/body/jit(_splash_attention)/splash_mha_fwd/pallas_call" stack_frame_id=4}
  %o = bf16[2,4,256,64]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%splash_mha_fwd.1), index=1, \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}
  %copy-start.1 = (bf16[2,2,256,64]{3,2,1,0:S(1)}, bf16[2,2,256,64]{3,2,1,0}, u32[]{:S(2)}) copy-start(%k)
  %copy-done.1 = bf16[2,2,256,64]{3,2,1,0:S(1)} copy-done(%copy-start.1)
  %slice-start.1 = ((bf16[8,64,64]{2,1,0}), bf16[1,64,64]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:1]}
  %slice-done.1 = bf16[1,64,64]{2,1,0:S(1)} slice-done(%slice-start.1)
  ROOT %r = bf16[2,4,256,64]{3,2,1,0} fusion(%o, %slice-done.1), kind=kOutput, calls=%product
}, execution_thread="main"

%product (a: bf16[2,4,256,64], b: bf16[1,64,64]) -> bf16[2,4,256,64] {
  %a = bf16[2,4,256,64]{3,2,1,0} parameter(0)
  %b = bf16[1,64,64]{2,1,0:S(1)} parameter(1)
  ROOT %d = bf16[2,4,256,64]{3,2,1,0} dot(%a, %b), lhs_contracting_dims={3}, rhs_contracting_dims={1}
}
"""


def test_what_stands_after_a_kernel_of_several_lines_is_read() -> None:
    r = reading.read(KERNEL, {"data": 1})
    q, k = 2 * 4 * 256 * 64, 2 * 2 * 256 * 64
    assert dict(r.kernels) == {"splash_mha_fwd": 1}
    assert r.scores == 2 * 2 * q * 256  # scores, and their products with values
    assert r.flops == {"bf16": 2 * q * 64}
    kernel = 2 * q + 2 * 2 * k + 2 * q + 4 * 2 * 256 * 128
    assert r.moved == kernel + 2 * k + 2 * 64 * 64 + 2 * 2 * q  # of what is fetched ahead only the source is in HBM


def test_a_kernel_of_one_row_has_no_batch_axis() -> None:
    one = KERNEL.replace("bf16[2,4,256,64]{3,2,1,0}", "bf16[4,256,64]{2,1,0}").replace(
        "bf16[2,4,256,64]", "bf16[4,256,64]"
    )
    one = one.replace("bf16[2,2,256,64]{3,2,1,0", "bf16[2,256,64]{2,1,0").replace(
        "lhs_contracting_dims={3}", "lhs_contracting_dims={2}"
    )
    r = reading.read(one, {"data": 1})
    assert r.scores == 2 * 2 * 4 * 256 * 64 * 256


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
    ],
)
def test_groups_in_every_way_to_write_them(text: str, expected: list[list[int]]) -> None:
    i = hlo.Instruction("x", "all-gather", [], [], f", {text}, dimensions={{0}}", "", False)
    assert hlo.groups(i, 4) == expected


@pytest.mark.parametrize(
    ("line", "pairs"),
    [
        # a plain product; heads as a window over all of them; a batch of products as a dilated convolution
        ("f32[8,16] convolution(f32[8,4] %a, f32[4,16] %b), dim_labels=bf_io->bf", 8 * 16 * 4),
        (
            "f32[2,5,3,7] convolution(f32[2,5,1,4] %a, f32[4,1,3,7] %b), "
            "window={size=1x3 pad=0_0x2_2 rhs_reversal=0x1}, dim_labels=0b1f_i01o->0b1f",
            2 * 5 * 3 * 7 * 4,
        ),
        (
            "f32[6,8,16] convolution(f32[6,8,4] %a, f32[6,4,16] %b), "
            "window={size=6 stride=5 lhs_dilate=6}, dim_labels=0bf_0io->0bf",
            6 * 8 * 16 * 4,
        ),
    ],
)
def test_products_as_convolutions(line: str, pairs: int) -> None:
    a, b = (hlo.shapes(x)[0] for x in line.partition("(")[2].split(" %b")[0].split(" %a, "))
    text = (
        "HloModule m\n\nENTRY %main (a: f32[1]) -> f32[1] {\n"
        f"  %a = f32[{','.join(map(str, a.dims))}] parameter(0)\n"
        f"  %b = f32[{','.join(map(str, b.dims))}] parameter(1)\n"
        f"  ROOT %c = {line}\n}}\n"
    )
    assert sum(reading.read(text, {"data": 1}).flops.values()) == 2 * pairs


def test_products_of_a_compiled_scan() -> None:
    def f(w_LDD: jax.Array, x_BD: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BD, w_LDD)[0].sum()

    text = jax.jit(f).lower(jnp.ones((5, 8, 8)), jnp.ones((4, 8))).compile().as_text()
    assert sum(reading.read(text, {"data": 1}).flops.values()) == 5 * 2 * 4 * 8 * 8


def test_collectives_of_a_step_on_eight_devices() -> None:
    script = """
import json, jax, jax.numpy as jnp
from jax.sharding import NamedSharding as N, PartitionSpec as P
from jaxtune.planning import reading
mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=N(mesh, P(("data", "fsdp"))))
w = jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=N(mesh, P("fsdp")))
f = jax.jit(lambda w, x: (x @ w).sum(), out_shardings=N(mesh, P()))
r = reading.read(f.lower(w, x).compile().as_text(), dict(mesh.shape))
print(json.dumps([sum(r.flops.values()), [[c.kind, c.axes, c.payload] for c in r.collectives]]))
"""
    flops, found = json.loads(on_eight_devices(script).stdout.splitlines()[-1])
    assert flops in (2 * 2 * 32 * 64, 2 * 16 * 8 * 64)  # the rows that a device has, or the columns that it has
    assert all(kind in reading.KINDS and axes for kind, axes, _ in found)
    assert {axis for _, axes, _ in found for axis in axes} == {"data", "fsdp"}
