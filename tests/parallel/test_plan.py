"""Memory, stacks that are assembled whole, and errors, on programs compiled for eight CPU devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.parallel import make_mesh
from jaxlm.parallel.hlo import Collective, Result, collectives
from jaxlm.parallel.plan import GB, Memory, Plan, Stack, gathered_parameters, memory, plan, stacked_arguments


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"fsdp": 4, "tensor": 2})


def compile_scan(mesh, gather_first):
    """A scan over a sharded stack that gathers one layer at a time, or everything before the loop."""

    def step(params, x):
        stack = params["layers_0-5/mlp/up/kernel"]
        if gather_first:
            stack = jax.lax.with_sharding_constraint(stack, NamedSharding(mesh, P(None, None, "tensor")))

        def layer(x, w):
            y = jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P("fsdp", None)))
            return jnp.tanh(y), None

        return jax.lax.scan(layer, x, stack)[0].sum()

    sharding = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    params = {"layers_0-5/mlp/up/kernel": jax.ShapeDtypeStruct((6, 64, 64), jnp.float32, sharding=sharding)}
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", None)))
    lowered = jax.jit(step).lower(params, x)
    return lowered, lowered.compile()


def test_a_stack_gathered_whole_is_found(mesh):
    lowered, compiled = compile_scan(mesh, gather_first=True)
    stacks = stacked_arguments(lowered, compiled)
    assert stacks == {"0/layers_0-5/mlp/up/kernel": (jnp.float32, (6, 64, 64), (6, 16, 32))}
    whole = gathered_parameters(collectives(compiled.as_text()), stacks)
    assert [(g.argument, g.result, g.collective.kind) for g in whole] == [
        ("0/layers_0-5/mlp/up/kernel", ("f32", (6, 64, 32)), "all-gather")
    ]


def test_only_results_of_the_same_kind_count():
    stacks = {"scale": Stack(jnp.float32, (6, 64), (6, 16)), "codes": Stack(jnp.int8, (6, 64, 32), (6, 16, 32))}

    def gather(dtype, shape):
        return Collective("all-gather", (Result(dtype, shape),), 0, 1, False, "")

    def arguments(*operations):
        return [g.argument for g in gathered_parameters(operations, stacks)]

    assert arguments(gather("bf16", (6, 1, 64)), gather("s8", (6, 32, 64))) == ["scale", "codes"]
    assert arguments(gather("s32", (6, 1, 64)), gather("f32", (6, 16)), gather("f32", (1, 64))) == []


def test_a_layer_gathered_at_a_time_is_fine(mesh):
    lowered, compiled = compile_scan(mesh, gather_first=False)
    operations = collectives(compiled.as_text())
    assert any(c.kind == "all-gather" and c.in_loop for c in operations)
    assert not gathered_parameters(operations, stacked_arguments(lowered, compiled))


def test_memory_counts_donated_outputs_once():
    sizes = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    compiled = jax.jit(lambda x: x * 2, donate_argnums=0).lower(sizes).compile()
    usage = memory(compiled)
    assert usage.arguments == usage.outputs == usage.aliased == 256 * 256 * 4
    assert usage.peak == usage.arguments + usage.temporary + usage.code


def test_the_report_says_whether_it_fits():
    need = Memory(arguments=10 * GB, outputs=10 * GB, aliased=9 * GB, temporary=6 * GB, code=0)
    report = Plan("v5e:4x4", {"fsdp": 16}, 20.0, need, 16 * GB, [], [])
    assert not report.fits and "17.00 of 16 GB DOES NOT FIT" in str(report)
    assert report._replace(limit=32 * GB).fits


def test_errors_name_what_to_do():
    with pytest.raises(ValueError, match=r"unknown TPU generation 'v5q'; did you mean 'v5p'"):
        plan(lambda mesh: None, "v5q:4x4", {"fsdp": -1})
