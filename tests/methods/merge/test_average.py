"""The mean of trees: against numpy, exact where it must be, and refused by path where there is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxlm.methods.merge.average import average


class Codes(struct.PyTreeNode):
    codes: jax.Array
    scale: jax.Array
    bits: int = struct.field(pytree_node=False, default=8)


finite = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=30, deadline=None)
@given(arrays(np.float32, (3, 4, 2), elements=finite), arrays(np.float64, 3, elements=st.floats(0.01, 10)))
def test_weighted_mean_against_numpy(leaves, weights):
    mean = average([{"a": {"kernel": jnp.asarray(leaf)}} for leaf in leaves], weights)["a"]["kernel"]
    expected = np.average(leaves.astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-6 * max(1.0, np.abs(leaves).max()))


@settings(max_examples=20, deadline=None)
@given(arrays(np.float32, (5,), elements=st.floats(width=32, allow_nan=False)))
def test_the_mean_of_equal_trees_is_that_tree_bit_for_bit(leaf):
    for dtype in (jnp.float32, jnp.bfloat16):
        tree = {"kernel": jnp.asarray(leaf).astype(dtype)}
        mean = average([tree] * 3, weights=[0.3, 1.1, 2.0])
        assert mean["kernel"].dtype == dtype
        assert np.asarray(mean["kernel"]).tobytes() == np.asarray(tree["kernel"]).tobytes()


def test_a_weight_of_one_and_zeros_picks_that_tree():
    trees = [{"w": jax.random.normal(jax.random.key(i), (8,))} for i in range(3)]
    np.testing.assert_allclose(average(trees, [0, 1, 0])["w"], trees[1]["w"], atol=1e-6)
    assert jnp.array_equal(average(trees, [1, 0, 0])["w"], trees[0]["w"])
    assert jnp.array_equal(average(trees[:1])["w"], trees[0]["w"])


def test_low_precision_is_summed_in_float32():
    trees = [{"w": jnp.full(4, value, jnp.bfloat16)} for value in [256.0, 258.0, 258.0, 258.0]]
    mean = average(trees)["w"]
    assert mean.dtype == jnp.bfloat16 and mean.tolist() == [258.0] * 4  # 257.5, rounded once
    small = [{"w": jnp.ones((), jnp.bfloat16)}] * 256 + [{"w": jnp.bfloat16(3)}] * 256
    assert average(small)["w"] == 2


def test_integers_are_kept_when_equal_and_refused_by_path_when_not():
    trees = [{"layers_0": {"kernel": Codes(jnp.array([1, 2]), jnp.array(scale))}} for scale in (0.5, 1.5)]
    mean = average(trees)["layers_0"]["kernel"]
    assert mean.codes.tolist() == [1, 2] and mean.codes.dtype == jnp.int32 and mean.scale == 1.0
    trees.append({"layers_0": {"kernel": Codes(jnp.array([1, 3]), jnp.array(1.0))}})
    with pytest.raises(ValueError, match=r"layers_0/kernel.codes: int32 values differ"):
        average(trees)
    with pytest.raises(ValueError, match="mask: bool values differ"):
        average([{"mask": jnp.array([True])}, {"mask": jnp.array([False])}])
    key = jax.random.key(0)
    assert average([{"key": key}] * 2)["key"] == key


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": {"w": jnp.ones(2)}}, r"params\[1\] differs .* structure: a/b is missing"),
        ({"a": {"w": jnp.ones(2), "c": jnp.ones(3)}}, r"a/b is missing; a/c is not in params\[0\]"),
        ({"a": {"w": jnp.ones(2), "b": (jnp.ones(3),)}}, "a/b: ArrayImpl against tuple"),
        ({"a": {"w": jnp.ones(2), "b": None}}, "a/b: ArrayImpl against NoneType"),
        (
            {"a": {"w": jnp.ones(2), "b": jnp.ones(4)}},
            r"a/b: params\[0\] has float32 \[3\], params\[1\] has float32 \[4\]",
        ),
        ({"a": {"w": jnp.ones(2), "b": jnp.ones(3, jnp.bfloat16)}}, "a/b: .* has bfloat16"),
        ([jnp.ones(2)], "the root: dict against list"),
    ],
)
def test_trees_that_differ_are_refused_by_path(other, message):
    with pytest.raises(ValueError, match=message):
        average([{"a": {"w": jnp.ones(2), "b": jnp.ones(3)}}, other])


def test_a_static_field_that_differs_is_refused_by_path():
    eight, four = ({"a": {"k": Codes(jnp.ones(1, int), jnp.ones(1), bits)}} for bits in (8, 4))
    with pytest.raises(ValueError, match=r"a/k: .*8.* against .*4"):
        average([eight, four])


@pytest.mark.parametrize("weights", [[1], [0, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weights"):
        average([{"w": jnp.ones(1)}] * 2, weights)


def test_nothing_to_average():
    with pytest.raises(ValueError, match="params is empty"):
        average([])


def test_sharded_leaves_stay_sharded_and_the_arguments_are_untouched():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    trees = [{"w": jax.device_put(jnp.full((8, 2), value), sharding)} for value in (1.0, 3.0)]
    mean = average(trees)["w"]
    assert mean.sharding == sharding and bool((mean == 2).all()) and bool((trees[0]["w"] == 1).all())
