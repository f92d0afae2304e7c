"""What all methods of unstructured pruning share: counts, zeros that stay zero, clipping, steps that were skipped."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import FakeQuant, Masked, Quantized
from jaxlm.io.checkpoint import Checkpoints
from jaxlm.methods.peft.low_rank import LowRank
from jaxlm.methods.prune.schedule import cubic, overdue
from jaxlm.methods.prune.unstructured.masking import Plan, layer_paths
from jaxlm.methods.prune.unstructured.scored import Scored
from jaxlm.runner import registry
from jaxlm.train.checkpointing import flatten, unflatten

pytestmark = pytest.mark.slow


def by_entry(share):
    return round(float(share) * 64)


def in_fours(share):
    return round(float(share) * 4) * 16


def in_eights(share):
    return round(float(share) * 8) * 8


# name -> (arguments, number of zeros in an 8x8 matrix at a share)
CASES = {
    "magnitude": ({"sparsity": 0.75}, by_entry),
    "taylor": ({"sparsity": 0.75}, by_entry),
    "movement": ({"sparsity": 0.75}, by_entry),
    "regrow": ({"sparsity": 0.75, "gradual": True}, by_entry),
    "movement 1:4": ({"pattern": "1:4"}, in_fours),
    "regrow 2:4": ({"pattern": "2:4", "gradual": True}, in_fours),
    "taylor block:2x4": ({"sparsity": 0.75, "pattern": "block:2x4"}, in_eights),
    "magnitude output": ({"sparsity": 0.5, "per": "output"}, in_eights),
}
BEGIN, END, EVERY = 2, 11, 3


def method_of(case, **changes):
    arguments = {"begin": BEGIN, "end": END, "every": EVERY, **CASES[case][0], **changes}
    return registry.make(registry.METHODS, {"name": case.split()[0], **arguments}, "methods")


@pytest.fixture(scope="module", params=CASES)
def trained(request, run):
    """A case, its 24 steps, and the final share of zeros."""
    case = request.param
    final = CASES[case][0].get("sparsity", {"1:4": 0.75, "2:4": 0.5}.get(case.split()[-1]))
    return SimpleNamespace(case=case, final=final, **run.follow(method_of(case), 24)._asdict())


def masks(run, state):
    return np.asarray(run.leaf(state).mask)


def test_the_schedule_is_kept_in_every_layer(run, trained):
    now, count = 0, CASES[trained.case][1]
    for number, state in enumerate(trained.states):
        if number in (2, 5, 8, 11):
            now = count(cubic(number, trained.final, BEGIN, END))
        assert [(~mask).sum() for mask in masks(run, state)] == [now, now]
    assert now == count(trained.final) > 0


def test_zeros_stay_exactly_zero_in_what_is_seen_and_in_moments(run, trained):
    """Twelve steps of Adam with decay after the last mask; neither may move what the forward pass does not see."""
    last = masks(run, trained.states[11])
    hidden = np.asarray(run.leaf(trained.states[11]).base)[~last]
    for state in trained.states[11:]:
        leaf, mask = run.leaf(state), masks(run, state)
        assert np.array_equal(mask, last)
        assert not np.asarray(leaf.materialize())[~mask].any()
        assert np.array_equal(np.asarray(leaf.base)[~mask], hidden), "it moved though nobody saw it"
        both = run.moments(state)
        assert len(both) == 2
        for moment in both:
            assert not np.asarray(moment)[~mask].any()
            assert np.asarray(moment)[mask].all() or state is trained.states[11], "but for what came back just now"
    assert hidden.any() == (trained.case.split()[0] == "movement")


def test_what_is_kept_goes_on_learning(run, trained):
    mask = masks(run, trained.states[-1])
    before, after = (np.asarray(run.leaf(trained.states[i]).base) for i in (12, -1))
    assert (before != after)[mask].all()


def test_baking_stores_the_zeros(run, trained):
    last = trained.states[-1]
    baked = trained.method.bake(run.lm_of(last.params), last.method)
    plain = baked.params["layers_0-1"]["mlp"]["up"]["kernel"]
    assert isinstance(plain, jax.Array) and np.array_equal(run.leaf(last).materialize(), plain)
    assert (~np.asarray(plain).astype(bool)).sum() == 2 * CASES[trained.case][1](trained.final)
    again = trained.method.bake(baked, last.method)
    assert again.params["layers_0-1"]["mlp"]["up"]["kernel"] is plain


def test_resumed_equals_uninterrupted_bit_for_bit(run, trained, tmp_path):
    """Stopped between two masks, with scores half gathered."""
    store = Checkpoints(tmp_path)
    middle = trained.states[7]
    store.save(7, flatten(middle), {})
    restored = store.restore({path: jax.ShapeDtypeStruct(a.shape, a.dtype) for path, a in flatten(middle).items()})
    store.close()
    state = unflatten(middle, restored[1])
    for _ in range(7, 13):
        state = trained.step(state)
    for resumed, uninterrupted in zip(jax.tree.leaves(state), jax.tree.leaves(trained.states[13]), strict=True):
        assert np.array_equal(resumed, uninterrupted)


@pytest.mark.parametrize("case", ["magnitude", "movement", "regrow"])
def test_a_skipped_step_at_the_end_does_not_lose_the_last_mask(run, case):
    followed = run.follow(method_of(case), 14, skipped=(8, 11))
    count = CASES[case][1]
    counts = [int((~masks(run, state)[0]).sum()) for state in followed.states]
    assert counts[8] == counts[7] and counts[11] == counts[10] < counts[12] == counts[14] == count(0.75)
    assert [bool(log["nonfinite"]) for log in followed.logs[7:12]] == [True, False, False, True, False]
    assert counts[9] == count(cubic(9, 0.75, BEGIN, END)), "made up for at the next step, at the share of that step"


def test_a_step_that_is_skipped_leaves_no_trace(run):
    followed = run.follow(method_of("movement"), 6, skipped=(4,))
    before, after = followed.states[3], followed.states[4]
    for old, new in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        assert np.array_equal(old, new)


@pytest.mark.parametrize("case", ["movement", "regrow"])
def test_the_norm_is_that_of_what_the_optimizer_sees(run, case):
    """Gradients of masked entries are scored, and neither clipped with nor counted."""
    followed = run.follow(method_of(case), 14, norm=0.5)
    state = followed.states[12]
    dense, mask = np.asarray(followed.grads(state)), masks(run, state)
    assert np.abs(dense[~mask]).min() > 0
    norm = float(followed.logs[12]["gradient_norm"])
    assert np.isclose(norm, np.sqrt((dense[mask] ** 2).sum()), rtol=1e-5) and norm > 0.5


def test_masks_are_the_gradient_that_others_see(run):
    """Without `dense`, the gradient of a masked entry is zero already."""
    followed = run.follow(method_of("taylor"), 12)
    dense, mask = np.asarray(followed.grads(followed.states[12])), masks(run, followed.states[12])
    assert not dense[~mask].any() and dense[mask].all()


def due_steps(begin, end, every, skipped=()):
    """Steps up to 40 that bring a new mask."""
    last, steps = 0, []
    for number in range(1, 41):
        if overdue(number, last, begin, end, every) and number not in skipped:
            last = number
            steps.append(number)
    return steps


def test_due_at_the_ends_in_between_and_after_what_was_skipped():
    assert due_steps(3, 20, 5) == [3, 8, 13, 18, 20] and due_steps(7, 7, 5) == [7]
    assert due_steps(0, 10, 4) == [4, 8, 10] and due_steps(1, 4, 1) == [1, 2, 3, 4]
    assert due_steps(3, 20, 5, skipped=(8, 20, 21)) == [3, 9, 13, 18, 22]


# Budgets -------------------------------------------------------------------------------------------------------------


def test_rules_give_every_layer_its_own_share(run):
    rules = ((r"layers_0/.*", 0.25), (r".*", 0.5))
    followed = run.follow(method_of("magnitude", sparsity=rules), 12)
    assert [int((~mask).sum()) for mask in masks(run, followed.states[-1])] == [16, 32]
    followed = run.follow(method_of("regrow", sparsity=rules, gradual=False), 3)
    assert [int((~mask).sum()) for mask in masks(run, followed.states[-1])] == [16, 32]


def test_one_budget_for_the_model_takes_from_where_least_is_lost(run):
    followed = run.follow(method_of("magnitude", sparsity=0.5, per="model", begin=1, end=1), 1)
    mask, values = masks(run, followed.states[-1]), np.asarray(run.leaf(followed.states[-1]).base)
    assert (~mask).sum() == 64 and (~mask[1]).sum() > (~mask[0]).sum(), "the second layer's weights are half as large"
    assert np.abs(values[mask]).min() > 0


def test_layers_that_are_no_targets_keep_their_masks(run):
    """They are stacked with targets because they are masked already."""
    keep = jax.random.bernoulli(jax.random.key(3), 0.6, (2, 8, 8))
    method = method_of("magnitude", targets=r"layers_1/.*", begin=1, end=1)
    followed = run.follow(method, 2, wrap=lambda values, i: Masked(values, keep[i]))
    now = masks(run, followed.states[-1])
    assert np.array_equal(now[0], keep[0]) and (~now[1]).sum() == 48
    with pytest.raises(ValueError, match="layers_0/mlp/up/kernel is stacked with targets"):
        run.follow(
            method_of("magnitude", targets=r"layers_1/.*", per="model"),
            1,
            wrap=lambda values, i: Masked(values, keep[i]),
        )


def test_paths_of_stacked_layers():
    assert layer_paths("decoder/layers_9-11/x") == [f"decoder/layers_{i}/x" for i in (9, 10, 11)]
    assert layer_paths("layers_3/x") == ["layers_3/x"] and layer_paths("head/x") == ["head/x"]


# What lies above and below -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["magnitude", "movement", "regrow"])
def test_masks_go_below_fake_quantization(run, case):
    """So that a pruned weight is zero before it is quantized, and baking keeps codes."""
    followed = run.follow(method_of(case, end=3, every=1), 4, wrap=lambda values, i: FakeQuant(values))
    last = run.leaf(followed.states[-1])
    assert isinstance(last, FakeQuant) and isinstance(last.base, Masked)
    assert isinstance(last.base, Scored) == (case == "movement")
    mask = np.asarray(last.base.mask)
    assert mask.mean() == 0.25 and not np.asarray(last.materialize())[~mask].any()
    assert not np.asarray(run.moments(followed.states[-1], f"{run.path}.base.base")[0])[~mask].any()


@pytest.mark.parametrize("inner", [LowRank, Quantized])
@pytest.mark.parametrize("case", ["taylor", "movement", "regrow"])
def test_gradients_of_what_is_no_array_are_not_known(run, case, inner):
    dense = jnp.ones((8, 8))
    leaf = Quantized.of(dense) if inner is Quantized else LowRank(dense, jnp.ones((8, 1)), jnp.ones((1, 8)))
    lm = run.lm_of({"layers_0": {"mlp": {"up": {"kernel": leaf}}}})
    with pytest.raises(ValueError, match=rf"{case}: layers_0/mlp/up/kernel holds a {inner.__name__}.*bake it first"):
        method_of(case).init(jax.random.key(0), lm)


def test_what_is_masked_already_stays_masked(run):
    """Also while the schedule asks for less than there is."""
    keep = jax.random.bernoulli(jax.random.key(3), 0.4, (2, 8, 8))
    followed = run.follow(method_of("magnitude"), 12, wrap=lambda values, i: Masked(values, keep[i]))
    assert not masks(run, followed.states[3])[~np.asarray(keep)].any()
    assert [(~mask).sum() for mask in masks(run, followed.states[-1])] == [48, 48]


@pytest.mark.parametrize("case", ["magnitude", "taylor", "movement", "regrow"])
def test_a_leaf_with_dimensions_of_its_own_is_no_stack_of_matrices(run, case):
    """A matrix an expert, say: three dimensions, in one layer."""
    up, experts = {"kernel": jnp.ones((8, 8))}, {"kernel": jnp.ones((2, 8, 8))}
    lm = run.lm_of({"layers_0": {"mlp": {"up": up, "experts": experts}}})
    message = (
        rf"{case}: layers_0/mlp/experts/kernel is no matrix but has the shape \(2, 8, 8\).*leave it out of targets"
    )
    with pytest.raises(ValueError, match=message):
        method_of(case).init(jax.random.key(0), lm)
    leaves = method_of(case, targets=r".*/up/kernel").init(jax.random.key(0), lm).lm.params["layers_0"]["mlp"]
    assert isinstance(leaves["up"]["kernel"], Masked) and leaves["experts"]["kernel"] is experts["kernel"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": None}, r"magnitude: sparsity must be in \[0, 1\), not None"),
        ({"sparsity": ((r".*up.*", 1.5),)}, r"sparsity must be in \[0, 1\), not 1.5"),
        ({"sparsity": 0.5, "pattern": "1:4"}, r"the pattern 1:4 has a sparsity of 0\.75, not 0\.5"),
        ({"per": "row"}, "unknown magnitude: per 'row'"),
        ({"per": "model", "sparsity": None, "pattern": "2:4"}, "one budget for all targets; leave out the pattern"),
        ({"per": "model", "sparsity": ((".*", 0.5),)}, "one budget for all targets; give one sparsity"),
        ({"pattern": "4"}, "unknown sparsity pattern '4'"),
    ],
)
def test_plans_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        method_of("magnitude", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": ((r".*down.*", 0.5),)}, r"the sparsity rule '\.\*down\.\*' matches no target"),
        ({"sparsity": ((r"layers_0/.*", 0.5),)}, "no sparsity rule matches 'layers_1/mlp/up/kernel'"),
        ({"pattern": "block:3x3"}, "its 8 inputs are not a multiple of 3"),
        ({"targets": "x"}, "targets 'x' match no parameter"),
    ],
)
def test_plans_that_do_not_fit_the_model(arguments, message, run):
    lm = run.start(lambda values, i: jnp.ones((8, 8)))
    with pytest.raises(ValueError, match=message):
        method_of("magnitude", **arguments).init(jax.random.key(0), lm)


def test_a_plan_says_what_it_wants_of_a_path():
    plan = Plan("x", ((r".*up.*", 0.5), (r".*", 0.25)), "unstructured", "matrix", r".*/kernel")
    assert plan.share("layers_0/up/kernel") == 0.5 and plan.share("a/kernel") == 0.25 and np.isnan(plan.share("a/bias"))
    assert plan.shares("layers_0-1/up/kernel").tolist() == [0.5, 0.5]
