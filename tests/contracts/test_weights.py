"""What every Weight promises, checked over the registry and every nesting; a new one joins by its line in a table."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import (
    Context,
    Factored,
    FakeQuant,
    InputScaled,
    Masked,
    Quantized,
    Scheme,
    Weight,
    attend,
    components,
    dot,
    flatten,
    materialize,
    node_class,
    nodes,
    take,
    unflatten,
)
from jaxlm.core.paths import field_of, replace_field
from jaxlm.core.weights.scheme import grid, straight_through
from jaxlm.io.lm import LM
from jaxlm.methods.observed import Observed
from jaxlm.methods.peft.low_rank import LowRank
from jaxlm.methods.prune.unstructured.scored import Scored
from jaxlm.methods.quantize.learned import LSQ, PACT
from jaxlm.methods.share.clustering import clustered
from jaxlm.models import model_config
from jaxlm.parallel import make_mesh, make_rules, shard_tree, shardings
from tests.contracts.small_models import quick

pytestmark = pytest.mark.slow

IN, OUT, ROWS = 16, 24, 5
AXES = ("embed", "ffn")
ROLES = {"base", "factor", "scale", "mask", "codes", "buffer"}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


OPEN = jax.random.bernoulli(jax.random.key(1), 0.6, (IN, OUT))
WEIGHTS = {name: node_class(name) for name in nodes() if issubclass(node_class(name), Weight)}


def trained(cls: type[Weight], base: Any) -> Weight:
    """`cls.of(base)` with what trains moved off its start."""
    weight = cls.of(base)  # type: ignore[attr-defined]
    for field, part in components(weight, AXES).items():
        if part.role in ("factor", "scale") and not field.startswith("base"):
            start = field_of(weight, field)
            weight = replace_field(weight, field, start * jnp.exp(normal(5, *start.shape)) + 0.1)
    return weight


# A Weight that `of(base)` does not make, or that `product` knows, has a line here.
LINES = {
    "Masked": lambda base: Masked(base, OPEN),
    "Scored": lambda base: Scored(base, OPEN, scores=normal(4, IN, OUT)),
    "FakeQuant": FakeQuant,
    "LSQ": lambda base: LSQ.of(base, Scheme("int4")),
    "PACT": lambda base: PACT.of(base, clip=4.0),
    "Quantized": lambda base: Quantized.of(materialize(base)),
    "Clustered": lambda base: clustered(materialize(base), 16, group=8),
    "LowRank": lambda base: LowRank(base, normal(2, IN, 4), normal(3, 4, OUT), scale=0.5, rate=0.25),
    "InputScaled": lambda base: InputScaled(base, jnp.exp(normal(4, IN))),
    "Factored": lambda base: Factored(normal(6, IN, 4), normal(7, 4, OUT)),
}
MAKE = {name: functools.partial(trained, cls) for name, cls in WEIGHTS.items() if name not in LINES} | LINES
DENSE = normal(0, IN, OUT)
SINGLE = {name: make(DENSE) for name, make in MAKE.items()}
OUTER = [name for name in MAKE if hasattr(SINGLE[name], "base")]
NESTED = {
    f"{outer}({inner})": MAKE[outer](SINGLE[inner])
    for outer in OUTER
    for inner in MAKE
    if inner != "PACT" or outer in LINES  # what becomes of inputs that the base quantizes, `product` knows of those
}
INT4, ASYMMETRIC, UNSIGNED = Scheme("int4", 6), Scheme("int8", None, False), Scheme("int8", "tensor", False)
RANGE = (-4.0, 5.0)
VARIANTS = {
    "Masked, dense gradient": Masked(DENSE, OPEN, dense_grad=True),
    "FakeQuant, dynamic": FakeQuant.of(DENSE, dynamic=True),
    "FakeQuant, rows": FakeQuant.of(DENSE, dynamic=True, channel=-2),
    "FakeQuant, int4 groups": FakeQuant.of(DENSE, Scheme("int4", 6, False), dynamic=True),
    "FakeQuant, nf4 rows": FakeQuant.of(DENSE, Scheme("nf4", 8), channel=-2),
    "LSQ, groups": LSQ.of(DENSE, INT4, dynamic=True),
    "LSQ, rows": LSQ.of(DENSE, INT4, channel=-2),
    "PACT, unsigned": PACT.of(DENSE, ASYMMETRIC, activations=UNSIGNED, clip=4.0),
    "PACT, rows": PACT.of(DENSE, channel=-2, clip=4.0),
    "Quantized, asymmetric": Quantized.of(DENSE, ASYMMETRIC),
    "Quantized, asymmetric both": Quantized.of(DENSE, ASYMMETRIC, activations=ASYMMETRIC),
    "Quantized, asymmetric rows": Quantized.of(DENSE, ASYMMETRIC, activations=ASYMMETRIC, channel=-2),
    "Quantized, tensor": Quantized.of(DENSE, Scheme("int8", "tensor"), dynamic=True),
    "Quantized, static": Quantized.of(DENSE, activations=Scheme("int8", "tensor"), input_range=RANGE),
    "Quantized, static asymmetric": Quantized.of(DENSE, INT4, activations=UNSIGNED, input_range=RANGE),
    "Quantized, int4": Quantized.of(DENSE, Scheme("int4"), dynamic=True),
    "Quantized, int4 groups": Quantized.of(DENSE, INT4),
    "Quantized, int4 groups, dynamic": Quantized.of(DENSE, Scheme("int4", 6, False), activations=ASYMMETRIC),
    "Quantized, int4 groups in rows": Quantized.of(DENSE, INT4, dynamic=True, channel=-2),
    "Quantized, int3": Quantized.of(DENSE, Scheme("int3", 8, False)),
    "Quantized, nf4": Quantized.of(DENSE, Scheme("nf4", 8)),
    "Quantized, nf4 rows": Quantized.of(DENSE, Scheme("nf4"), channel=-2),
    "Quantized, fp8": Quantized.of(DENSE, Scheme("fp8_e4m3"), dynamic=True),
    "Quantized, fp8 groups": Quantized.of(DENSE, Scheme("fp8_e5m2", 8), channel=-2),
    "Quantized, dynamic": Quantized.of(DENSE, dynamic=True),
    "Quantized, rows": Quantized.of(DENSE, dynamic=True, channel=-2),
    "LowRank(Quantized, dynamic)": MAKE["LowRank"](Quantized.of(DENSE, dynamic=True)),
    "LowRank(Quantized, rows)": MAKE["LowRank"](Quantized.of(DENSE, dynamic=True, channel=-2)),
    "LowRank(Quantized, nf4)": MAKE["LowRank"](Quantized.of(DENSE, Scheme("nf4", 8))),
    "LowRank(FakeQuant(Masked))": MAKE["LowRank"](FakeQuant.of(SINGLE["Masked"], dynamic=True)),
    "InputScaled(Quantized, dynamic)": MAKE["InputScaled"](Quantized.of(DENSE, dynamic=True)),
    "Factored(Quantized, Masked)": Factored(
        Quantized.of(normal(6, IN, 4)), Masked(normal(7, 4, OUT), jnp.arange(4 * OUT).reshape(4, OUT) % 3 > 0)
    ),
}
STORED: dict[str, Weight] = SINGLE | NESTED | VARIANTS
CASES: dict[str, Weight] = STORED | {"Observed": Observed(SINGLE["LowRank"], "up")}  # which is never stored
every = pytest.mark.parametrize("name", CASES)
WITH_TRANSFORMS = [*SINGLE, *VARIANTS]
SHARDED = [
    "LowRank(Quantized, dynamic)",
    "Quantized, rows",
    "Quantized, asymmetric both",
    "Quantized, int4 groups, dynamic",
    "Quantized, int4 groups in rows",
    "Quantized, nf4",
    "Quantized, static asymmetric",
    "FakeQuant(Masked)",
]


def test_every_registered_weight_is_here():
    assert MAKE.keys() == WEIGHTS.keys(), "a new Weight needs `of(base)` or a line in MAKE"
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
    """What `x @ W` (channel -1) or `x @ Wᵀ` (-2) should be: inputs quantized where the Weight says so."""
    if isinstance(w, InputScaled):
        return product(w.base, x * w.scale, -1) if channel == -1 else product(w.base, x, -2) * w.scale
    if isinstance(w, LowRank):
        a, b = (w.a, w.b) if channel == -1 else (w.b.T, w.a.T)
        return product(w.base, x, channel) + w.scale * (x @ a) @ b
    if getattr(w, "activations", None) is not None and w.channel == channel:
        x = quantized_inputs(w, x)
    return x @ (materialize(w) if channel == -1 else materialize(w).T)


def quantized_inputs(w: Any, x: jax.Array) -> jax.Array:
    """Inputs as the Weight's format of activations has them, in floats."""
    if isinstance(w, PACT):
        return w.rounded(x)
    if w.activations.group == "tensor":
        scale, zero = grid(jnp.array(RANGE)[None], w.activations)
    else:
        scale, zero = jax.lax.stop_gradient(grid(x, w.activations, -1))
    return straight_through(x, scale, zero, w.activations, -1)


def floats(w: Weight) -> Weight:
    """The arrays that could be differentiated, the others (float8 codes too) left out."""
    return jax.tree.map(lambda a: a if jnp.issubdtype(a.dtype, jnp.floating) and a.dtype.itemsize > 1 else None, w)


def fill(w: Weight, values: Weight) -> Weight:
    return jax.tree.map(lambda new, old: old if new is None else new, values, w, is_leaf=lambda a: a is None)


@quick
def evaluate(w: Weight, i: Inputs) -> dict[str, Any]:
    """What every nesting is asked to do, compiled once a case."""
    ctx = Context()

    def both(values, x, h, dot_, attend_):
        weight = fill(w, values)
        return jnp.sum(dot_(weight, x) * i.r) + jnp.sum(attend_(weight, h) * i.q)

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
        "float32 of bfloat16": (dot(small[0], w, ctx, jnp.float32), attend(small[1], w, ctx, jnp.float32)),
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
    """In every float array and in both inputs; straight through where inputs are quantized."""
    ours, theirs = results(name)["gradient"]
    assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(theirs))
    same(ours, theirs)
    if name not in ("PACT, unsigned", "InputScaled(PACT)"):  # which clip many of the inputs
        same(theirs[1], np.asarray(INPUTS.r) @ results(name)["dense"].T)


@pytest.mark.parametrize("name", WITH_TRANSFORMS)
def test_bfloat16_in_bfloat16_out(name):
    for out, what in zip(transformed(name)["bfloat16"], ("dot", "attend"), strict=True):
        exact = results(name)[what][1]
        assert out.dtype == jnp.bfloat16
        assert np.abs(out.astype(np.float32) - exact).max() <= 0.03 * np.abs(exact).max()


@pytest.mark.parametrize("name", WITH_TRANSFORMS)
def test_bfloat16_in_float32_out(name):
    """As logits are asked for: what the products add up to, not that rounded to bfloat16 and widened again."""
    for wide, out in zip(transformed(name)["float32 of bfloat16"], transformed(name)["bfloat16"], strict=True):
        assert wide.dtype == np.float32
        assert np.abs(wide - out.astype(np.float32)).max() <= 2**-7 * np.abs(wide).max()
        nonzero = wide[wide != 0]  # of closed rows nothing can be rounded
        assert (nonzero != nonzero.astype(out.dtype).astype(np.float32)).mean() > 0.8


def sizes_of(w, field, axis):
    """What a dimension with this axis name may measure: of a scale, the groups that lie along it."""
    outer, _, last = field.rpartition(".")
    scheme, size = getattr(field_of(w, outer), "scheme", None), {"embed": IN, "ffn": OUT}[axis]
    return {size, scheme.groups(size)} if last in ("scale", "zero") and scheme is not None else {size}


@every
def test_components_name_every_array(name):
    w = CASES[name]
    parts = components(w, AXES)
    assert sorted(map(id, (field_of(w, field) for field in parts))) == sorted(map(id, jax.tree.leaves(w)))
    for field, part in parts.items():
        assert part.role in ROLES, field
        assert len(part.axes) == field_of(w, field).ndim
        for axis, size in zip(part.axes, field_of(w, field).shape, strict=True):
            assert axis is None or size in sizes_of(w, field, axis)


@pytest.mark.parametrize("name", [*SINGLE, *SHARDED])
def test_sharded_equals_unsharded(name):
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    axes = {"w": AXES}
    rules = make_rules({}, axes, mesh)
    tree = {"w": CASES[name]}
    placed = shard_tree(tree, shardings(tree, axes, mesh, rules))["w"]
    arrays = jax.tree.leaves(placed)
    pieces = {len({str(s.index) for s in a.addressable_shards}) for a in arrays}
    assert 8 in pieces or pieces == {2, 4}, "neither is an array cut in eight, nor are two cut one way each"
    run = quick(lambda w, i: (dot(i.x, w), take(w, i.ids), attend(i.h, w)))
    same(run(placed, INPUTS), tuple(results(name)[what][0] for what in ("dot", "take", "attend")))


def test_survive_saving_with_their_statics(tmp_path):
    config = model_config("gpt2", vocab_size=8, hidden_size=IN, num_heads=2, num_layers=len(STORED), ffn_size=OUT)
    lm = LM.initialize(config, jax.random.key(0))
    flat = flatten(lm.params)
    flat |= {f"layers_{i}/mlp/up/kernel": w for i, w in enumerate(STORED.values())}
    reason = jaxlm.save(lm.replace(params=unflatten(flat)), tmp_path / "model", native=True)
    assert reason is not None
    again = flatten(jaxlm.load(tmp_path / "model").params)
    for i, (name, w) in enumerate(STORED.items()):
        stored = again[f"layers_{i}/mlp/up/kernel"]
        assert jax.tree.structure(stored) == jax.tree.structure(w), name  # types and static fields
        for ours, theirs in zip(jax.tree.leaves(stored), jax.tree.leaves(w), strict=True):
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), name


# The mathematics of each ----------------------------------------------------------------------------------------------


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


def test_input_scaled_is_the_diagonal_times_the_base():
    w = SINGLE["InputScaled"]
    same(results("InputScaled")["dense"], np.diag(np.asarray(w.scale)) @ np.asarray(DENSE), 1e-6)


def test_input_scaled_gives_its_base_the_scaled_inputs():
    """Inputs are quantized after the scaling: what an outlying channel would have cost the others is gone."""
    scale = jnp.ones(IN).at[3].set(1e-3)
    x = INPUTS.x.at[:, 3].multiply(1e3)
    plain, smooth = Quantized.of(DENSE, dynamic=True), InputScaled(Quantized.of(DENSE, dynamic=True), scale)
    exact = lambda w: x @ materialize(w)  # noqa: E731
    error = lambda w: np.abs(dot(x, w) - exact(w)).max() / np.abs(exact(w)).max()  # noqa: E731
    assert np.array_equal(dot(x, smooth), dot(x * scale, smooth.base))
    assert np.abs(dot(x, smooth) - exact(smooth)).max() < 0.1 * np.abs(dot(x, plain) - exact(plain)).max()
    assert error(smooth) < 0.02


def test_factored_is_the_product_of_its_factors():
    w = SINGLE["Factored"]
    same(results("Factored")["dense"], np.asarray(w.a, np.float64) @ np.asarray(w.b, np.float64), 1e-6)


def test_observed_tells_what_it_is_multiplied_by():
    observed = []
    ctx = Context(observe=lambda name, x: observed.append((name, x)))
    w = Observed(DENSE, "up")
    assert np.array_equal(w.dot(INPUTS.x, ctx), INPUTS.x @ DENSE)
    assert observed[0][0] == "up" and observed[0][1] is INPUTS.x and len(observed) == 1
    w.attend(INPUTS.h, ctx), w.take(INPUTS.ids, ctx)
    assert len(observed) == 1, "only products are observed"


FAKE_QUANT = [n for n, w in CASES.items() if isinstance(w, FakeQuant)]


@pytest.mark.parametrize("name", FAKE_QUANT)
def test_quantization_aware_training_stores_the_function_that_it_trains(name):
    w = CASES[name]
    stored = w.quantize()
    assert np.array_equal(results(name)["dense"], quick(materialize)(stored))
    assert (stored.scheme, stored.activations, stored.channel) == (w.scheme, w.activations, w.channel)
    same(dot(INPUTS.x, stored), results(name)["dot"][0])
    same(attend(INPUTS.h, stored), results(name)["attend"][0])


@pytest.mark.parametrize("name", [n for n in VARIANTS if isinstance(CASES[n], FakeQuant | Quantized)])
def test_zero_channels_and_constant_inputs(name):
    dense = DENSE.at[:, 3].set(0).at[2].set(0)
    w = CASES[name]
    options = {"activations": w.activations, "channel": w.channel}
    if isinstance(w, Quantized) and w.input_scale is not None:
        options["input_range"] = RANGE
    w = type(w).of(dense, w.scheme, **options)
    x = jnp.stack([jnp.zeros(IN), jnp.ones(IN), jnp.full(IN, 1e-40), INPUTS.x[0]])
    y = dot(x, w)
    assert np.isfinite(y).all() and not np.asarray(y)[0].any() and not np.asarray(y)[:, 3].any()
    if w.activations is None or w.activations.group is None:
        same(y[1], materialize(w).sum(0))
    assert np.isfinite(jax.grad(lambda x: dot(x, w).sum())(x)).all()
