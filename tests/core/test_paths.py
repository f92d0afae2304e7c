"""One engine of paths: rules, roles, names, and errors that name what is nearest."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import (
    Masked,
    Quantized,
    arrays,
    canonical_path,
    check_rules,
    describe,
    first_match,
    flatten,
    map_leaves,
    matches,
    merge,
    partition,
    trainable,
    trained_names,
    unflatten,
    with_arrays,
)
from jaxlm.methods.peft.low_rank import LowRank

W = LowRank(Quantized.of(jnp.ones((3, 4))), jnp.ones((3, 2)), jnp.ones((2, 4)))
TREE = {
    "embed": {"embedding": jnp.ones((5, 3))},
    "layers_0": {"up": {"kernel": W, "bias": jnp.zeros(4)}},
    "layers_1": {"up": {"kernel": Masked(jnp.ones((3, 4)), jnp.ones((3, 4), bool)), "bias": jnp.zeros(4)}},
}
AXES = {
    "embed/embedding": ("vocab", "embed"),
    "layers_0/up/kernel": ("embed", "ffn"),
    "layers_0/up/bias": ("ffn",),
    "layers_1/up/kernel": ("embed", "ffn"),
    "layers_1/up/bias": ("ffn",),
}


def test_flatten_keeps_nodes_and_order():
    flat = flatten(TREE)
    assert list(flat) == list(AXES)
    assert flat["layers_0/up/kernel"] is W and flatten(unflatten(flat)) == flat


def test_names_roles_and_axes_of_everything():
    infos = describe(TREE, AXES)
    assert {n: (i.role, i.axes) for n, i in infos.items() if "kernel" in n} == {
        "layers_0/up/kernel.base.codes": ("codes", ("embed", "ffn")),
        "layers_0/up/kernel.base.scale": ("buffer", (None, "ffn")),
        "layers_0/up/kernel.a": ("factor", ("embed", None)),
        "layers_0/up/kernel.b": ("factor", (None, "ffn")),
        "layers_1/up/kernel.base": ("base", ("embed", "ffn")),
        "layers_1/up/kernel.mask": ("mask", ("embed", "ffn")),
    }
    assert infos.keys() == arrays(TREE).keys()


def test_a_leaf_without_axis_names_is_an_error():
    with pytest.raises(KeyError, match=r"layers_1/up/bias.*no axis names"):
        describe(TREE, {path: axes for path, axes in AXES.items() if path != "layers_1/up/bias"})


def test_with_arrays_is_the_inverse_of_arrays():
    values = {name: a + 1 if a.dtype != bool else ~a for name, a in arrays(TREE).items()}
    again = arrays(with_arrays(TREE, values))
    assert all(np.array_equal(again[name], values[name]) for name in values)
    with pytest.raises(KeyError, match=r"missing \['embed/embedding'\]"):
        with_arrays(TREE, {n: a for n, a in values.items() if n != "embed/embedding"})
    with pytest.raises(KeyError, match=r"unexpected \['x'\]"):
        with_arrays(TREE, {**values, "x": 0})


@pytest.mark.parametrize(
    ("pattern", "path", "role", "expected"),
    [
        (r".*/kernel", "layers_0/up/kernel", "base", True),
        (r".*/kernel", "layers_0/up/kernels", "base", False),
        (r"kernel", "layers_0/up/kernel", "base", False),  # the whole path
        (r"layers_1/.*", "layers_10/up", "base", False),
        (r".*#factor", "layers_0/up/kernel", "factor", True),
        (r".*#factor", "layers_0/up/kernel", "base", False),
        (r".*/kernel#(base|factor)", "a/kernel", "factor", True),
    ],
)
def test_matching(pattern, path, role, expected):
    assert matches(pattern, path, role) is expected


def test_the_first_rule_wins():
    rules = [("a/.*", 1), (".*#factor", 2), (".*", 3)]
    assert [first_match(rules, p, r) for p, r in (("a/b", "factor"), ("b", "factor"), ("b", "base"))] == [1, 2, 3]
    assert first_match(rules[:2], "b", "base") is None and first_match([], "b", default=7) == 7


def test_a_rule_that_matches_nothing_names_the_nearest():
    infos = describe(TREE).values()
    check_rules([(r"layers_\d/up/kernel#factor", 0), ("embed/.*", 1)], infos, "decay")
    with pytest.raises(ValueError, match=r"decay: the rule 'layers_0/up/kernl' matches no .*layers_0/up/kernel"):
        check_rules([("embed/.*", 1), ("layers_0/up/kernl", 0)], infos, "decay")
    with pytest.raises(ValueError, match="kernel#scale"):
        check_rules([(".*kernel#scale", 0)], infos, "decay")


def test_canonical_path():
    assert canonical_path("decoder/layers_12-15/mlp/up") == "decoder/layers_12/mlp/up"
    assert canonical_path("layers_3/mlp") == "layers_3/mlp"


# Partition -----------------------------------------------------------------------------------------------------------


def test_partition_and_merge():
    verdicts = [lambda info: info.role == "factor", lambda info: True if info.path.startswith("embed") else None]
    trained, frozen = partition(TREE, trained_names(describe(TREE), verdicts))
    assert trained.keys() == {"layers_0/up/kernel.a", "layers_0/up/kernel.b", "embed/embedding"}
    assert trained.keys() | frozen.keys() == arrays(TREE).keys() and not trained.keys() & frozen.keys()
    again = merge(TREE, {n: a * 0 for n, a in trained.items()}, frozen)
    assert not np.asarray(flatten(again)["embed/embedding"]).any()
    assert flatten(again)["layers_1/up/kernel"].base is flatten(TREE)["layers_1/up/kernel"].base


def test_the_last_opinion_wins_and_masks_never_train():
    infos = describe(TREE)
    info = infos["layers_0/up/bias"]
    assert trainable([], info) and not trainable([lambda i: True, lambda i: False, lambda i: None], info)
    for name in ("layers_0/up/kernel.base.codes", "layers_0/up/kernel.base.scale", "layers_1/up/kernel.mask"):
        assert not trainable([lambda i: True], infos[name])


def test_map_leaves_sees_paths_and_whole_nodes():
    seen = {}
    map_leaves(lambda path, leaf: seen.setdefault(path, type(leaf)), TREE)
    assert seen["layers_0/up/kernel"] is LowRank and len(seen) == 5
