"""Collectives read from program text: written by hand, and as XLA writes them on eight devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.parallel import make_mesh
from jaxlm.parallel.hlo import collectives, parse, traffic

PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter (input: f32[8,16]) -> f32[4,16] {
  %input = f32[8,16]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[8,16]{1,0:T(8,128)} all-reduce(%input), channel_id=9, to_apply=%add
  ROOT %slice.9 = f32[4,16]{1,0} slice(%all-reduce.9), slice={[0:4], [0:16]}
}

%begin (p: bf16[1,4]) -> (bf16[1,4], bf16[1,16]) {
  %p = bf16[1,4]{1,0:T(2,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[1,16]{1,0} all-gather(%p), channel_id=3, dimensions={1}, frontend_attributes={chain_id="7"}
  ROOT %c = (bf16[1,4]{1,0}, bf16[1,16]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%continue (q: bf16[1,4]) -> bf16[1,16] {
  %q = bf16[1,4]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[1,16]{1,0} all-gather(%q), channel_id=3, dimensions={1}, frontend_attributes={chain_id="7"}
}

%inner_condition (s: (u32[], bf16[1,4])) -> pred[] {
  %s = (u32[], bf16[1,4]{1,0}) parameter(0)
  %four = u32[]{:T(128)} constant(4)
  %j = u32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %less = pred[] compare(%j, %four), direction=LT
}

%inner_body (s2: (u32[], bf16[1,4])) -> (u32[], bf16[1,4]) {
  %s2 = (u32[], bf16[1,4]{1,0}) parameter(0)
  %x2 = bf16[1,4]{1,0} get-tuple-element(%s2), index=1
  %f2 = bf16[1,16]{1,0} fusion(%x2), kind=kOutput, calls=%continue
  %collective-permute-start.1 = (bf16[1,4]{1,0}, bf16[1,4]{1,0}, u32[]) collective-permute-start(%x2), channel_id=4
  %collective-permute-done.1 = bf16[1,4]{1,0} collective-permute-done(%collective-permute-start.1)
  ROOT %t2 = (u32[], bf16[1,4]{1,0}) tuple(%s2, %collective-permute-done.1)
}

%condition (t: (s32[], /*index=1*/bf16[1,4])) -> pred[] {
  %t = (s32[], bf16[1,4]{1,0}) parameter(0)
  %layers = s32[]{:T(128)} constant(24)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %layers), direction=LT
}

%body (t1: (s32[], bf16[1,4])) -> (s32[], bf16[1,4]) {
  %t1 = (s32[], bf16[1,4]{1,0}) parameter(0)
  %x = bf16[1,4]{1,0} get-tuple-element(%t1), index=1
  %f1 = (bf16[1,4]{1,0}, bf16[1,16]{1,0}) fusion(%x), kind=kCustom, calls=%begin
  %inner = (u32[], bf16[1,4]{1,0}) while(%t1), condition=%inner_condition, body=%inner_body
  %h = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%unused
  %all-reduce.3 = bf16[4,8]{1,0} all-reduce(%h), channel_id=5, to_apply=%add, metadata={op_name="layer/output"}
  ROOT %t3 = (s32[], bf16[1,4]{1,0}) tuple(%x, %x)
}

ENTRY %main (p0: f32[2,4], p1: f32[8,16]) -> f32[4,16] {
  %p0 = f32[2,4]{1,0} parameter(0)
  %p1 = f32[8,16]{1,0} parameter(1)
  %one = s32[]{:T(128)} constant(1)
  %ag = ((f32[2,4]{1,0}), (f32[8,4]{1,0})) all-gather-start(%p0), channel_id=1, dimensions={0}
  %agd = f32[8,4]{1,0} all-gather-done(%ag)
  %init = (s32[], bf16[1,4]{1,0}) tuple(%one, %p0)
  %loop = (s32[], bf16[1,4]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %rs = f32[4,16]{1,0} fusion(%p1), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_a_program_written_by_hand():
    in_loops = {c.kind: c for c in collectives(PROGRAM) if c.in_loop}
    assert in_loops["all-reduce"] == ("all-reduce", (("bf16", (4, 8)),), 64, 23, True, "layer/output")
    assert (
        in_loops["all-gather"].times == 23 and in_loops["all-gather"].bytes == 32
    )  # spread over two loops, counted once
    assert in_loops["collective-permute"].times == 92 and in_loops["collective-permute"].bytes == 8
    outside = {c.kind: c for c in collectives(PROGRAM) if not c.in_loop}
    assert outside["all-gather"].bytes == 8 * 4 * 4 and outside["all-gather"].times == 1
    assert outside["reduce-scatter"].bytes == 8 * 16 * 4
    assert len(collectives(PROGRAM)) == 5
    assert traffic(collectives(PROGRAM))["all-gather"] == (2, 1, 24, 128 + 23 * 32)


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("module {}")


def test_what_xla_writes_for_a_scan():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})

    def step(stack, x):
        def layer(x, w):
            y = jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P("fsdp", None)))
            return jnp.tanh(y), None

        return jax.lax.scan(layer, x, stack)[0].sum()

    stack = jax.ShapeDtypeStruct((6, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", None)))
    text = jax.jit(step).lower(stack, x).compile().as_text()
    operations = collectives(text)
    inside = [c for c in operations if c.in_loop]
    assert [(c.kind, c.times, c.bytes) for c in inside] == [("all-gather", 6, 64 * 64 * 4)]
    assert "all-reduce" in {c.kind for c in operations if not c.in_loop}  # the sum
