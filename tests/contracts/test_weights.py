"""What every Weight promises, checked over the registry and every nesting; a new one joins by one line in MAKE."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.compress.cluster import clustered
from jaxlm.core import (
    WEIGHTS,
    Context,
    FakeQuant,
    LowRank,
    Masked,
    Quantized,
    Scored,
    Weight,
    attend,
    components,
    dot,
    flatten,
    materialize,
    take,
    unflatten,
)
from jaxlm.core.paths import field_of
from jaxlm.core.weights import fake_quantize, scale_of
from jaxlm.core.weights.quantized import integer_product, round_to_codes
from jaxlm.models import model_config
from jaxlm.models.model import Model
from jaxlm.parallel import make_mesh, make_rules, shard_tree, shardings

IN, OUT, ROWS = 16, 24, 5
AXES = ("embed", "ffn")
ROLES = {"base", "factor", "scale", "mask", "codes", "buffer"}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


OPEN = jax.random.bernoulli(jax.random.key(1), 0.6, (IN, OUT))
MAKE = {
    "Masked": lambda base: Masked(base, OPEN),
    "Scored": lambda base: Scored(base, OPEN, scores=normal(4, IN, OUT)),
    "FakeQuant": lambda base: FakeQuant(base),
    "Quantized": lambda base: Quantized.of(materialize(base)),
    "Clustered": lambda base: clustered(materialize(base), 16, group=8),
    "LowRank": lambda base: LowRank(base, normal(2, IN, 4), normal(3, 4, OUT), scale=0.5, rate=0.25),
}
DENSE = normal(0, IN, OUT)
SINGLE = {name: make(DENSE) for name, make in MAKE.items()}
OUTER = [name for name in MAKE if hasattr(SINGLE[name], "base")]
NESTED = {f"{outer}({inner})": MAKE[outer](SINGLE[inner]) for outer in OUTER for inner in MAKE}
VARIANTS = {
    "Masked, dense gradient": Masked(DENSE, OPEN, dense_grad=True),
    "FakeQuant, dynamic": FakeQuant(DENSE, dynamic=True),
    "FakeQuant, rows": FakeQuant(DENSE, dynamic=True, channel=-2),
    "Quantized, dynamic": Quantized.of(DENSE, dynamic=True),
    "Quantized, rows": Quantized.of(DENSE, dynamic=True, channel=-2),
    "LowRank(Quantized, dynamic)": MAKE["LowRank"](Quantized.of(DENSE, dynamic=True)),
    "LowRank(Quantized, rows)": MAKE["LowRank"](Quantized.of(DENSE, dynamic=True, channel=-2)),
    "LowRank(FakeQuant(Masked))": MAKE["LowRank"](FakeQuant(SINGLE["Masked"], dynamic=True)),
}
CASES: dict[str, Weight] = SINGLE | NESTED | VARIANTS
every = pytest.mark.parametrize("name", CASES)
WITH_TRANSFORMS = [*SINGLE, *VARIANTS]


def test_every_registered_weight_is_here():
    assert MAKE.keys() == WEIGHTS.keys(), "a new Weight needs one line in MAKE"
    assert all(type(SINGLE[name]) is cls for name, cls in WEIGHTS.items())


class Inputs(NamedTuple):
    x: jax.Array  # [rows, in]
    h: jax.Array  # [rows, out]
    ids: jax.Array  # [rows]
    r: jax.Array  # cotangent [rows, out]
    q: jax.Array  # cotangent [rows, in]


INPUTS = Inputs(
    normal(10, ROWS, IN),
    normal(11, ROWS, OUT),
    jnp.array([3, 0, 15, 3, 7]),
    normal(12, ROWS, OUT),
    normal(13, ROWS, IN),
)


def product(w: Any, x: jax.Array, channel: int) -> jax.Array:
    """What `x @ W` (channel -1) or `x @ Wᵀ` (-2) should be: inputs rounded where the Weight says so."""
    if isinstance(w, LowRank):
        a, b = (w.a, w.b) if channel == -1 else (w.b.T, w.a.T)
        return product(w.base, x, channel) + w.scale * (x @ a) @ b
    if getattr(w, "dynamic", False) and w.channel == channel:
        x = fake_quantize(x, jax.lax.stop_gradient(scale_of(x, axis=-1)))
    return x @ (materialize(w) if channel == -1 else materialize(w).T)


def floats(w: Weight) -> Weight:
    """The arrays that could be differentiated, the others left out."""
    return jax.tree.map(lambda a: a if jnp.issubdtype(a.dtype, jnp.floating) else None, w)


def fill(w: Weight, values: Weight) -> Weight:
    return jax.tree.map(lambda new, old: old if new is None else new, values, w, is_leaf=lambda a: a is None)


# Compiling takes most of the time here, so it is told not to optimize.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
quick = functools.partial(jax.jit, compiler_options=QUICK)


@quick
def evaluate(w: Weight, i: Inputs) -> dict[str, Any]:
    """What every nesting is asked to do, compiled once a case."""
    ctx = Context()

    def both(values, x, h, dot_, attend_):
        own = fill(w, values)
        return jnp.sum(dot_(own, x) * i.r) + jnp.sum(attend_(own, h) * i.q)

    ours = jax.grad(lambda *a: both(*a, lambda w, x: dot(x, w, ctx), lambda w, h: attend(h, w, ctx)), (0, 1, 2))
    theirs = jax.grad(lambda *a: both(*a, lambda w, x: product(w, x, -1), lambda w, h: product(w, h, -2)), (0, 1, 2))
    return {
        "dense": materialize(w),
        "dot": (dot(i.x, w, ctx), product(w, i.x, -1)),
        "attend": (attend(i.h, w, ctx), product(w, i.h, -2)),
        "take": (take(w, i.ids, ctx), materialize(w)[i.ids]),
        "one row": (dot(i.x[2:3], w, ctx), dot(i.x, w, ctx)[2:3]),
        "gradient": (ours(floats(w), i.x, i.h), theirs(floats(w), i.x, i.h)),
    }


@quick
def transform(w: Weight, second: Weight, i: Inputs) -> dict[str, Any]:
    """Other shapes and dtypes, and jax's transformations."""
    ctx = Context()
    pair = jax.tree.map(lambda *a: jnp.stack(a), w, second)
    xs = jnp.stack([i.x, 2 * i.x])
    small = (i.x.astype(jnp.bfloat16), i.h.astype(jnp.bfloat16))
    return {
        "take, two dimensions": (take(w, i.ids[None], ctx), materialize(w)[i.ids][None]),
        "a vector": (dot(i.x[2], w, ctx), dot(i.x, w, ctx)[2]),
        "three dimensions": (dot(xs, w, ctx)[1], dot(2 * i.x, w, ctx)),
        "vmap": (
            jax.vmap(lambda w, x: dot(x, w, ctx))(pair, xs),
            jnp.stack([dot(xs[0], w, ctx), dot(xs[1], second, ctx)]),
        ),
        "scan": (
            jax.lax.scan(lambda c, w: (c + dot(i.x, w, ctx), take(w, i.ids, ctx)), jnp.zeros_like(i.r), pair),
            (dot(i.x, w, ctx) + dot(i.x, second, ctx), jnp.stack([take(w, i.ids, ctx), take(second, i.ids, ctx)])),
        ),
        "bfloat16": (dot(small[0], w, ctx), attend(small[1], w, ctx)),
    }


def other(w: Weight) -> Weight:
    """Another Weight of the same structure."""
    return jax.tree.map(lambda a: a[::-1] if a.ndim == 2 else a, w)


@functools.cache
def results(name: str) -> dict[str, Any]:
    return jax.tree.map(np.asarray, evaluate(CASES[name], INPUTS))


@functools.cache
def transformed(name: str) -> dict[str, Any]:
    return jax.tree.map(np.asarray, transform(CASES[name], other(CASES[name]), INPUTS))


def same(a, b, tolerance=2e-5):
    """Equal to `tolerance` times the largest entry: what float32 sums in another order may differ by."""
    for ours, theirs in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert ours.shape == theirs.shape and np.isfinite(ours).all()
        assert np.abs(ours - theirs).max() <= tolerance * max(np.abs(theirs).max(), 1.0)


@every
@pytest.mark.parametrize("what", ["dot", "attend", "take", "one row"])
def test_behaves_like_its_matrix(name, what):
    same(*results(name)[what])


@pytest.mark.parametrize("name", WITH_TRANSFORMS)
@pytest.mark.parametrize("what", ["take, two dimensions", "a vector", "three dimensions", "vmap", "scan"])
def test_behaves_the_same_transformed(name, what):
    same(*transformed(name)[what])


@every
def test_shape_and_dtype_are_those_of_the_matrix(name):
    dense = results(name)["dense"]
    assert CASES[name].shape == dense.shape == (IN, OUT)
    assert CASES[name].dtype == dense.dtype == jnp.float32


@every
def test_gradients_are_those_of_the_matrix(name):
    """In every float array and in both inputs; straight through where inputs are rounded."""
    ours, theirs = results(name)["gradient"]
    assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(theirs))
    same(ours, theirs)
    dense = results(name)["dense"]
    same(theirs[1], np.asarray(INPUTS.r) @ dense.T)


@pytest.mark.parametrize("name", WITH_TRANSFORMS)
def test_bfloat16_in_bfloat16_out(name):
    for out, what in zip(transformed(name)["bfloat16"], ("dot", "attend"), strict=True):
        exact = results(name)[what][1]
        assert out.dtype == jnp.bfloat16
        assert np.abs(out.astype(np.float32) - exact).max() <= 0.03 * np.abs(exact).max()


@every
def test_components_name_every_array(name):
    w = CASES[name]
    parts = components(w, AXES)
    assert sorted(map(id, (field_of(w, field) for field in parts))) == sorted(map(id, jax.tree.leaves(w)))
    for field, part in parts.items():
        assert part.role in ROLES, field
        assert len(part.axes) == field_of(w, field).ndim
        for axis, size in zip(part.axes, field_of(w, field).shape, strict=True):
            assert axis is None or {"embed": IN, "ffn": OUT}[axis] == size


@pytest.mark.parametrize("name", [*SINGLE, "LowRank(Quantized, dynamic)", "Quantized, rows", "FakeQuant(Masked)"])
def test_sharded_equals_unsharded(name):
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    axes = {"w": AXES}
    rules = make_rules({}, axes, mesh)
    tree = {"w": CASES[name]}
    placed = shard_tree(tree, shardings(tree, axes, mesh, rules))["w"]
    arrays = jax.tree.leaves(placed)
    assert any(len({str(s.index) for s in a.addressable_shards}) == 8 for a in arrays), "nothing is cut in eight"
    run = quick(lambda w, i: (dot(i.x, w), take(w, i.ids), attend(i.h, w)))
    same(run(placed, INPUTS), tuple(results(name)[what][0] for what in ("dot", "take", "attend")))


def test_survive_saving_with_their_statics(tmp_path):
    config = model_config("gpt2", vocab_size=8, hidden_size=IN, num_heads=2, num_layers=len(CASES), ffn_size=OUT)
    flat = flatten(Model(config).init(jax.random.key(0)))
    flat |= {f"layers_{i}/mlp/up/kernel": w for i, w in enumerate(CASES.values())}
    reason = jaxlm.save(jaxlm.LM(config, unflatten(flat)), tmp_path / "model", native=True)
    assert reason is not None
    again = flatten(jaxlm.load(tmp_path / "model").params)
    for i, (name, w) in enumerate(CASES.items()):
        stored = again[f"layers_{i}/mlp/up/kernel"]
        assert jax.tree.structure(stored) == jax.tree.structure(w), name  # types and static fields
        for ours, theirs in zip(jax.tree.leaves(stored), jax.tree.leaves(w), strict=True):
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), name


# Each one's own mathematics ------------------------------------------------------------------------------------------


def test_masked_is_the_product_with_the_mask():
    w = SINGLE["Masked"]
    assert np.array_equal(results("Masked")["dense"], np.asarray(DENSE) * np.asarray(w.mask))
    gradient = results("Masked")["gradient"][0][0].base
    assert not gradient[~np.asarray(w.mask)].any() and gradient[np.asarray(w.mask)].all()


def test_masked_passes_the_gradient_through_where_it_is_asked_to():
    """The matrix is the masked one to the bit, the gradient that of a matrix without a mask."""
    name = "Masked, dense gradient"
    assert np.array_equal(results(name)["dense"], results("Masked")["dense"])
    dense, masked = (results(n)["gradient"][0][0].base for n in (name, "Masked"))
    assert np.array_equal(np.where(np.asarray(OPEN), dense, 0), masked) and dense.all()


def test_low_rank_is_the_sum():
    w = SINGLE["LowRank"]
    exact = np.asarray(DENSE, np.float64) + 0.5 * np.asarray(w.a, np.float64) @ np.asarray(w.b, np.float64)
    same(results("LowRank")["dense"], exact, 1e-6)


def test_low_rank_drops_inputs_of_the_update_only():
    ctx = Context(key=jax.random.key(0))
    x = jnp.ones((1, IN))
    w = LowRank(DENSE, normal(2, IN, 4), jnp.zeros((4, OUT)), rate=0.5)
    assert np.array_equal(w.dot(x, ctx), x @ DENSE)
    w = LowRank(jnp.zeros((IN, IN)), jnp.eye(IN), jnp.eye(IN), rate=0.5)
    assert sorted(set(np.asarray(w.dot(x, ctx)).ravel().tolist())) == [0.0, 2.0]
    assert np.array_equal(w.dot(x, Context()), x)


def numpy_codes(x, axis):
    """Symmetric int8 by hand, in float32 as the scales are."""
    x = np.asarray(x, np.float32)
    scale = np.abs(x).max(axis=axis, keepdims=True) / np.float32(127)
    scale = np.where(scale == 0, np.float32(1), scale)
    return np.clip(np.rint(x / scale), -127, 127).astype(np.int64), scale


@pytest.mark.parametrize("channel", [-1, -2])
def test_quantized_codes_and_scales(channel):
    w = Quantized.of(DENSE, channel=channel)
    codes, scale = numpy_codes(DENSE, axis=0 if channel == -1 else 1)
    assert w.codes.dtype == jnp.int8 and np.array_equal(w.codes, codes)
    assert np.allclose(w.scale, scale, rtol=1e-6) and w.scale.shape == scale.shape
    assert np.abs(np.asarray(materialize(w)) - np.asarray(DENSE)).max() <= 0.5001 * scale.max()
    assert np.abs(np.asarray(w.codes)).max() == 127  # -128 stays unused


def test_integer_product_is_exact():
    """Compared by codes: the sums are integers, so equality is exact; and 127·127·in is beyond int16."""
    codes_x, scale_x = numpy_codes(100 * INPUTS.x, axis=1)
    w = CASES["Quantized, dynamic"]
    sums = codes_x @ np.asarray(w.codes, np.int64)
    ours = quick(lambda x: integer_product(round_to_codes(x, scale_of(x, axis=-1)), w.codes))(100 * INPUTS.x)
    assert np.array_equal(np.asarray(ours, np.int64), sums) and np.abs(sums).max() > 2**15
    same(w.dot(100 * INPUTS.x, Context()), sums * scale_x * np.asarray(w.scale), 1e-6)


@pytest.mark.parametrize("rows", [1, 7, 8, 9])
def test_integer_product_of_few_rows(rows):
    x = jax.random.randint(jax.random.key(rows), (rows, IN), -127, 128).astype(jnp.int8)
    w = jax.random.randint(jax.random.key(99), (IN, OUT), -127, 128).astype(jnp.int8)
    assert np.array_equal(quick(integer_product)(x, w), np.asarray(x, np.int64) @ np.asarray(w, np.int64))


@pytest.mark.parametrize("name", ["FakeQuant", "FakeQuant, dynamic", "FakeQuant, rows", "FakeQuant(Masked)"])
def test_fake_quant_stores_the_function_that_it_trains(name):
    stored = CASES[name].quantize()
    assert np.array_equal(results(name)["dense"], materialize(stored))
    assert (stored.dynamic, stored.channel) == (CASES[name].dynamic, CASES[name].channel)
    same(dot(INPUTS.x, stored), results(name)["dot"][0])
    same(attend(INPUTS.h, stored), results(name)["attend"][0])


def test_fake_quantize_gradient_is_one_inside_and_zero_outside():
    scale = jnp.float32(0.1)
    x = jnp.array([-12.8, -12.71, -12.69, -0.26, 0.0, 12.65, 12.69, 12.75, 40.0])
    value, gradient = jax.vmap(jax.value_and_grad(lambda x: fake_quantize(x, scale)))(x)
    assert gradient.tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]
    assert np.allclose(value, [-12.7, -12.7, -12.7, -0.3, 0, 12.6, 12.7, 12.7, 12.7], atol=1e-5)


def test_the_largest_weight_of_every_channel_learns():
    """It sits on the border of the range, where rounding must not decide whether its gradient passes."""
    w = normal(5, 64, 200)
    gradient = jax.grad(lambda w: FakeQuant(w).materialize().sum())(w)
    assert np.array_equal(gradient, np.ones_like(gradient))


@pytest.mark.parametrize(
    "name", [n for n in CASES if "Quant" in n and not n.startswith(("Masked", "Scored", "LowRank"))]
)
def test_zero_channels_and_constant_inputs(name):
    dense = DENSE.at[:, 3].set(0).at[2].set(0)
    w = CASES[name]
    channel, dynamic = w.channel, w.dynamic
    if isinstance(w, Quantized):
        w = Quantized.of(dense, dynamic=dynamic, channel=channel)
    else:
        w = FakeQuant(dense, dynamic=dynamic, channel=channel)
    x = jnp.stack([jnp.zeros(IN), jnp.ones(IN), jnp.full(IN, 1e-40), INPUTS.x[0]])
    y = dot(x, w)
    assert np.isfinite(y).all() and not np.asarray(y)[0].any() and not np.asarray(y)[:, 3].any()
    same(y[1], materialize(w).sum(0))
    assert np.isfinite(jax.grad(lambda x: dot(x, w).sum())(x)).all()
