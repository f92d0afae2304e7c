"""Sharded equals unsharded; the shardings of arrays, trees, batches and activations; errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.core import (
    Context,
    Masked,
    Quantized,
    axis_names,
    axis_sizes,
    describe,
    flatten,
    initialize,
    map_leaves,
    merge,
    partition,
    trained_names,
)
from jaxlm.core.context import unsharded
from jaxlm.methods.peft.low_rank import LowRank
from jaxlm.models.config import ModelConfig
from jaxlm.models.transformer import forward, model_spec
from jaxlm.nn.layer import Rotary
from jaxlm.nn.stack import run_view
from jaxlm.parallel import (
    make_mesh,
    make_rules,
    mask_padded_logits,
    num_shards,
    pad_vocab,
    place,
    shard_tree,
    shardings,
    spec_of,
)
from jaxlm.parallel.batches import to_devices

pytestmark = pytest.mark.slow

RULES = {"embed": "fsdp", "ffn": "tensor", "kv_heads": "tensor", "vocab": "tensor", "batch": ("data", "fsdp")}
HEADS = ("kv_heads", "q_per_kv", "head_dim")

GPT = ModelConfig("gpt2", vocab_size=61, hidden_size=16, num_layers=2, num_heads=4, max_positions=16)
LLAMA = ModelConfig(
    "llama",
    vocab_size=61,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_size=24,
    rotary=Rotary(),
    norm="rms",
    activation="silu",
    gated=True,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    tie_embeddings=False,
)
RAGGED = GPT.replace(num_layers=3, num_heads=(4, 2, 2), num_kv_heads=(4, 2, 2), head_dim=4, ffn_size=(64, 22, 22))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def low_rank(path, leaf):
    a, b = jnp.ones((leaf.shape[0], 3)) / 10, jnp.full((3, leaf.shape[1]), 0.01)
    return LowRank(Quantized.of(leaf), a, b, scale=2.0)


METHODS = {
    "query/kernel": low_rank,
    "up/kernel": lambda path, leaf: Quantized.of(leaf),
    "down/kernel": lambda path, leaf: Masked(leaf, jnp.abs(leaf) > 0.01),
}


def with_weights(params):
    """Weights of several kinds in place of some kernels."""
    ends = {path: next((e for e in METHODS if path.endswith(e)), None) for path in flatten(params)}
    return map_leaves(lambda path, leaf: METHODS[ends[path]](path, leaf) if ends[path] else leaf, params)


CASES = {
    "gpt": (GPT, False, {"data": 2, "fsdp": 2, "tensor": 2}),
    "llama": (LLAMA, False, {"fsdp": 2, "tensor": 4}),  # fewer key/value heads than tensor parts
    "ragged": (RAGGED, False, {"fsdp": 4, "tensor": 2}),
    "weights": (LLAMA, True, {"data": 2, "fsdp": 2, "tensor": 2}),
    "a fourth axis": (LLAMA, False, {"fsdp": 2, "expert": 2, "tensor": 2}),
}


def loss(config, trained, frozen, template, batch, ctx):
    """Next-token cross-entropy, and the logits."""
    logits = forward(config, merge(template, trained, frozen), batch, ctx=ctx)["logits"]
    logits = mask_padded_logits(logits, config.vocab_size)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), batch["input_ids"][:, 1:, None], axis=-1)
    return -chosen.mean(), logits[..., : config.vocab_size]


@pytest.mark.parametrize("case", CASES)
def test_sharded_forward_and_gradients_equal_those_of_one_device(case):
    config, weights, shape = CASES[case]
    mesh = make_mesh(shape)
    spec = model_spec(config)
    params = initialize(jax.random.key(0), spec)
    params = map_leaves(lambda path, x: x + 0.1 if path.endswith("bias") else 3 * x, params)
    params = with_weights(params) if weights else params
    params = pad_vocab(params, axis_names(spec), 4)
    params = run_view(params, lambda path: None)
    rules = make_rules({"ffn": "expert"} if "expert" in shape else {}, axis_names(spec), mesh)
    sharded = shard_tree(params, shardings(params, axis_names(spec), mesh, rules, axis_sizes(spec)))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (8, 12)).astype(np.int32)

    results = []
    for tree, batch, ctx in (
        (params, {"input_ids": ids}, Context()),
        (sharded, to_devices(mesh, rules)({"input_ids": ids})[1], Context(place=place(mesh, rules))),
    ):
        trained, frozen = partition(tree, trained_names(describe(tree)))
        step = jax.jit(jax.value_and_grad(partial(loss, config), has_aux=True))
        results.append(step(trained, frozen, tree, batch, ctx))
    (values, grads), (sharded_values, sharded_grads) = results
    np.testing.assert_allclose(sharded_values[0], values[0], rtol=1e-5)
    np.testing.assert_allclose(sharded_values[1], values[1], rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        np.testing.assert_allclose(sharded_grads[name], grad, rtol=1e-5, atol=1e-5, err_msg=name)
        assert np.abs(grad).max() > 1e-7 or "key/bias" in name, name


def test_weights_and_stacks_get_shardings(mesh):
    spec = model_spec(GPT)
    params = run_view(with_weights(initialize(jax.random.key(0), spec)), lambda path: None)
    rules = make_rules({}, axis_names(spec), mesh)
    specs = {name: s.spec for name, s in shardings(params, axis_names(spec), mesh, rules, axis_sizes(spec)).items()}
    query = "layers_0-1/attention/query/kernel"
    assert specs[f"{query}.base.codes"] == P(None, "fsdp", "tensor")
    assert specs[f"{query}.base.scale"] == P(None, None, "tensor")
    assert specs[f"{query}.a"] == P(None, "fsdp")
    assert specs[f"{query}.b"] == P(None, None, "tensor")
    assert specs["layers_0-1/mlp/down/kernel.base"] == P(None, "tensor", "fsdp")
    assert specs["layers_0-1/mlp/down/kernel.mask"] == P(None, "tensor", "fsdp")
    assert specs["embed/positions/embedding"] == P(None, "fsdp")


def test_a_compound_dimension_is_cut_between_heads():
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    axes = ("embed", HEADS)
    assert spec_of(axes, (8, 16), RULES, mesh) == P("fsdp", "tensor")
    assert spec_of(axes, (8, 16), RULES, mesh, {HEADS: (2, 2, 4)}) == P("fsdp")
    assert spec_of(axes, (8, 16), RULES, mesh, {HEADS: (4, 1, 4)}) == P("fsdp", "tensor")
    by_group = {"q_per_kv": "tensor"}
    assert spec_of(axes, (8, 16), by_group, mesh, {HEADS: (2, 2, 4)}) == P(None, "tensor")


def test_precedence_and_division(mesh):
    twice = {"embed": "fsdp", "embed_out": "fsdp"}
    assert spec_of(("embed", "embed_out"), (8, 8), twice, mesh) == P("fsdp")
    assert spec_of(("embed_out", "embed"), (8, 8), twice, mesh) == P("fsdp")
    assert spec_of(("embed",), (7,), RULES, mesh) == P()
    assert spec_of(("embed",), (6,), {"embed": ("fsdp", "tensor")}, mesh) == P("fsdp")
    assert spec_of(("embed",), (8,), {"embed": ("fsdp", "tensor")}, mesh) == P(("fsdp", "tensor"))
    assert spec_of((), (), RULES, mesh) == P() == spec_of(("embed",), (0,), RULES, mesh)
    with pytest.raises(ValueError, match="every dimension needs one"):
        spec_of(("embed",), (8, 8), RULES, mesh)


def test_what_does_not_divide_is_logged_once(mesh, monkeypatch):
    spec = model_spec(GPT)
    params = initialize(jax.random.key(0), spec)

    def logged(params, rules):
        lines = []
        monkeypatch.setattr("absl.logging.info", lambda message, *values: lines.append(message % values))
        shardings(params, axis_names(spec), mesh, rules)
        return [line.removeprefix("sharding: ") for line in lines]

    lines = logged(params, RULES)
    assert lines == ["vocab over tensor=2: 61 does not divide; replicated in embed/tokens/embedding"]
    assert not logged(pad_vocab(params, axis_names(spec), 2), RULES)
    lines = logged(params, {"ffn": "tensor", "embed": "tensor"})
    assert [line.split(" over")[0] for line in lines] == ["ffn", "embed"]
    assert lines[0].endswith("another dimension of the array has it; replicated in layers_0/mlp/up/kernel and 1 more")


def test_one_device_costs_nothing():
    mesh = make_mesh(devices=jax.devices()[:1])
    assert place(mesh, RULES) is unsharded
    assert num_shards("vocab", mesh, RULES) == 1
    assert spec_of(("vocab", "embed"), (61, 7), RULES, mesh) == P()


def test_rules_are_checked(mesh):
    axes = axis_names(model_spec(GPT))
    assert make_rules({"ffn": None, "vocab": ["fsdp", "tensor"]}, axes, mesh)["vocab"] == ("fsdp", "tensor")
    with pytest.raises(ValueError, match=r"names the axis 'emned'.*did you mean 'embed'"):
        make_rules({"emned": "fsdp"}, axes, mesh)
    with pytest.raises(ValueError, match=r"mesh axis 'tensors'.*did you mean 'tensor'"):
        make_rules({"ffn": "tensors"}, axes, mesh)
    with pytest.raises(ValueError, match="'ffn' names a mesh axis twice"):
        make_rules({"ffn": ("fsdp", "fsdp")}, axes, mesh)
    with pytest.raises(ValueError, match="'buckets', which nothing has"):
        make_rules({"buckets": "fsdp"}, axes, mesh)


def test_rules_name_the_axes_of_the_mesh():
    axes = axis_names(model_spec(GPT))
    two = make_rules({}, axes, make_mesh({"fsdp": 4, "tensor": 2}))
    assert (two["batch"], two["embed"], two["ffn"], two["length"]) == (("fsdp",), ("fsdp",), ("tensor",), None)
    four = make_mesh({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2})
    rules = make_rules({"ffn": "expert"}, axes, four)
    assert spec_of(("embed", "ffn"), (16, 64), rules, four) == P("fsdp", "expert")
    with pytest.raises(ValueError, match=r"mesh axis 'expert' has 2 devices and no sharding rule names it"):
        make_rules({}, axes, four)
    with pytest.raises(ValueError, match=r"'tensr' has 8 devices.*compute the same.*did you mean 'tensor'"):
        make_rules({}, axes, make_mesh({"data": 1, "tensr": 8}))
    assert make_rules({}, axes, make_mesh({"data": 8, "tensr": 1}))["ffn"] is None


def test_trees_are_checked(mesh):
    params = {"new": {"kernel": jnp.ones((4, 4))}}
    with pytest.raises(KeyError, match="new/kernel"):
        shardings(params, {}, mesh, RULES)
    with pytest.raises(ValueError, match="new/kernel: an array of shape"):
        shardings(params, {"new/kernel": ("embed",)}, mesh, RULES)
    with pytest.raises(KeyError, match="new/kernel"):
        shard_tree(params, {})


def test_abstract_trees_get_their_shardings(mesh):
    params = {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}
    sharded = shard_tree(params, shardings(params, {"kernel": ("embed", "ffn")}, mesh, RULES))
    assert flatten(sharded)["kernel"].sharding.spec == P("fsdp", "tensor")


def test_activations_are_pinned_by_name(mesh):
    constrain = place(mesh, RULES)
    x = jax.jit(lambda x: constrain(x * 2, ("batch", "length", "ffn")))(jnp.ones((4, 3, 8)))
    assert x.sharding.spec == P(("data", "fsdp"), None, "tensor")
    odd = jax.jit(lambda x: constrain(x * 2, ("batch", None, "kv_heads")))(jnp.ones((4, 3, 7)))
    assert odd.sharding.spec[0] == ("data", "fsdp")
    assert place(mesh, RULES) == constrain and hash(place(mesh, RULES)) == hash(constrain)


def test_batches_must_divide(mesh):
    put = to_devices(mesh, RULES)
    tokens, batch = put({"input_ids": np.ones((8, 4), np.int32), "labels": np.ones(8), "segment_ids": np.eye(8, 4)})
    assert batch["input_ids"].sharding.spec == P(("data", "fsdp")) == batch["labels"].sharding.spec and tokens == 4
    with pytest.raises(ValueError, match="a batch of 6 rows does not divide over the 4 devices"):
        put({"input_ids": np.ones((6, 4), np.int32)})
