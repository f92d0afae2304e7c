"""What every Method promises, checked over the registry on three families; what pairs of four leave behind."""

import functools
import itertools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import (
    Context,
    Loss,
    Masked,
    Method,
    MethodInit,
    Node,
    Quantized,
    Step,
    arrays,
    chain,
    describe,
    flatten,
    map_leaves,
    materialize,
    trained_names,
    with_arrays,
)
from jaxlm.io.lm import LM
from jaxlm.io.safetensors import open_tensors
from jaxlm.losses.cross_entropy import cross_entropy
from jaxlm.methods.peft.low_rank import LowRank
from jaxlm.models import model_config
from jaxlm.nn.stack import canonical_view
from jaxlm.runner import registry
from jaxlm.runner.distillation import distillation
from jaxlm.train.gradient import step_gradient
from jaxlm.train.optimizer import optimizer
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import TrainState, create_state, dropout_key, make_step
from tests.contracts.small_models import BATCH, OnlyTeacher, logits, noisy, quick

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 19, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "ffn_size": 12}
FAMILIES = {
    "gpt2": {"max_positions": 8, "dropout": 0.1},
    "llama": {"num_kv_heads": 2},
    "bert": {"max_positions": 8},
}
# Where its defaults are not strong enough for two steps to show, a method has a line here.
ARGUMENTS: dict[str, dict[str, Any]] = {name: {} for name in registry.METHODS} | {
    "l0": {"size": 0.5, "end": 2, "speed": 50.0},
    "lora": {"rank": 2, "alpha": 8.0},
    "magnitude": {"sparsity": 0.5, "end": 2, "every": 1},
    "movement": {"sparsity": 0.5, "end": 2, "every": 1},
    "qat": {"dynamic": False},
    "lsq": {"bits": "int4", "group": 8},
    "pact": {"clip": 0.05},
    "regrow": {"pattern": "2:4", "end": 2, "every": 1},
    "structured": {"heads": 0.5, "ffn": 0.25, "end": 2, "every": 1},
    "taylor": {"sparsity": 0.5, "end": 2, "every": 1},
    "distill": {"alpha": 0.7, "hidden": 1.0, "attention": 1.0, "relations": 1.0},
}
# At zero strength a method changes nothing. Quantization has no such setting.
ZERO: dict[str, dict[str, Any]] = {
    "magnitude": {"sparsity": 0.0, "end": 2, "every": 1},
    "structured": {"end": 2, "every": 1},
    "distill": {"alpha": 0.0},
}


def test_every_registered_method_is_here():
    assert ARGUMENTS.keys() == registry.METHODS.keys() | {"distill"}, "a line in ARGUMENTS of a method that is none"


@functools.cache
def student(family: str) -> LM:
    return noisy(model_config(family, **SIZES, **FAMILIES[family]))


@functools.cache
def teachers() -> OnlyTeacher:
    """Deeper and wider than the students, so that hidden states need a map and a projection."""
    config = model_config("gpt2", **{**SIZES, "num_layers": 3, "hidden_size": 24}, max_positions=8)
    return OnlyTeacher(LM.initialize(config, jax.random.key(1)))


def method_of(name: str, arguments: dict[str, Any]) -> Method:
    if name == "distill":
        return distillation({"name": name, "teacher": "deeper", **arguments}, teachers())
    return registry.make(registry.METHODS, {"name": name, **arguments}, "methods")


class Trained(NamedTuple):
    """What two training steps leave; `lm` is the model that they began from, with what methods added."""

    lm: LM
    method: Method
    trained: frozenset[str]
    states: list[TrainState]
    compiled: int


def prepared(family: str, names: tuple[str, ...], arguments=ARGUMENTS) -> tuple[Method, MethodInit]:
    """A chain of methods, and what its init gives."""
    method = chain([(name, method_of(name, arguments[name])) for name in names])
    return method, method.init(jax.random.key(2), student(family))


def train(family: str, names: tuple[str, ...], arguments=ARGUMENTS, microbatches: int = 1) -> Trained:
    method, (lm, constants, method_state) = prepared(family, names, arguments)

    def base(taps) -> Loss:
        def fn(params, constants, batch, ctx):
            outputs = lm.network.forward(params, batch, ctx=ctx, taps=taps)
            return {"cross_entropy": cross_entropy(outputs["logits"], batch["labels"])}, outputs

        return Loss(fn, taps)

    view = lm.network.run_view(lm.params)
    infos = describe(view)
    names = trained_names(infos, [method.trainable])
    loss = method.loss(base(method.loss(base(frozenset())).taps))
    grad = step_gradient(method, loss, names, microbatches)
    settings = TrainSettings(steps=10, learning_rate=0.02, schedule="constant", weight_decay=0.1)
    tx = optimizer(settings, 10, {name: infos[name] for name in names})
    step = quick(make_step(grad, tx, method, names, ctx=Context(), largest_norm=1.0))
    states = [quick(lambda p, m: create_state(dropout_key(3), p, m, tx, names))(view, method_state)]
    for _ in range(2):
        state, log = step(states[-1], constants, BATCH)
        assert int(log["nonfinite"]) == 0
        states.append(state)
    return Trained(lm, method, names, states, step._cache_size())


@functools.cache
def trained(run: str) -> Trained:
    return train(*RUNS[run])


def unbaked(run: Trained) -> LM:
    """The trained model as it is evaluated."""
    last = run.states[-1]
    return run.lm.replace(params=canonical_view(run.method.eval_params(last.params, last.method)))


def baked(run: Trained) -> LM:
    return run.method.bake(unbaked(run), run.states[-1].method)


def equal(a, b) -> bool:
    flat_a, flat_b = arrays(a), arrays(b)
    return flat_a.keys() == flat_b.keys() and all(np.array_equal(flat_a[name], flat_b[name]) for name in flat_a)


# Each method alone, and long chains, accumulated, on other families.
RUNS: dict[str, tuple] = {name: ("gpt2", (name,)) for name in ARGUMENTS} | {
    "all on llama": ("llama", ("structured", "magnitude", "qat", "distill"), ARGUMENTS, 2),
    "all on bert": ("bert", ("structured", "lora", "distill"), ARGUMENTS, 2),
    "gates on bert": ("bert", ("lora", "l0", "distill"), ARGUMENTS, 2),
}
every_run = pytest.mark.parametrize("name", RUNS)


@pytest.mark.full("all on bert")
@every_run
def test_what_does_not_train_is_bit_identical(name):
    run = trained(name)
    before, after = arrays(run.states[0].params), arrays(run.states[-1].params)
    moved = {n for n in before if not np.array_equal(before[n], after[n])}
    infos = describe(run.states[0].params)
    learns = run.trained
    masks = {n for n, info in infos.items() if info.role in ("mask", "buffer")}
    assert moved <= learns | masks
    assert learns <= moved, "something that should train did not"
    assert moved & masks or not masks


@every_run
def test_state_keeps_its_structure_and_compiles_once(name):
    run = trained(name)
    assert run.compiled == 1
    kinds = [jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), state) for state in run.states]
    assert kinds[0] == kinds[1] == kinds[2]


@every_run
def test_baked_is_what_was_evaluated(name):
    run = trained(name)
    last = run.states[-1]
    expected = logits(run.lm.network, run.method.eval_params(last.params, last.method))
    lm = baked(run)
    abstract = lm.network.abstract()
    assert flatten(lm.params).keys() == lm.axes.keys() == flatten(abstract).keys()
    assert np.abs(logits(lm.network, lm.params) - expected).max() <= 2e-5 * max(np.abs(expected).max(), 1)
    dense = map_leaves(lambda _, leaf: materialize(leaf), lm.params)
    assert jax.tree.map(jnp.shape, dense) == jax.tree.map(jnp.shape, abstract)


@every_run
def test_baking_twice_changes_nothing(name):
    run = trained(name)
    lm = baked(run)
    again = run.method.bake(lm, run.states[-1].method)
    assert again.config == lm.config and again.axes == lm.axes and equal(again.params, lm.params)


@functools.cache
def plain() -> Trained:
    return train("gpt2", ())


def test_zero_strength_trains_like_nothing():
    """But for the biases of keys: their gradient is zero but for rounding, which Adam makes steps of."""
    lm = baked(train("gpt2", tuple(ZERO), ZERO))
    assert lm.config == plain().lm.config
    for path, leaf in flatten(canonical_view(plain().states[-1].params)).items():
        if not path.endswith("key/bias"):
            assert np.allclose(flatten(lm.params)[path], leaf, rtol=0, atol=1e-6), path


@every_run
def test_a_loss_that_couples_rows_says_so_through_every_transform(name):
    inner = Loss(lambda *_: ({}, {}), couples=frozenset({"negatives"}))
    assert trained(name).method.loss(inner).couples == {"negatives"}


def test_lora_begins_as_the_identity():
    lm, first = student("gpt2"), trained("lora").states[0]
    assert any(isinstance(leaf, LowRank) for leaf in flatten(first.params).values())
    expected = logits(lm.network, lm.network.run_view(lm.params))
    assert np.array_equal(logits(lm.network, first.params), expected)


def test_distillation_learns_through_its_projection():
    """Also where a method freezes everything else."""
    for name in ("distill", "all on bert"):
        first, last = (flatten(trained(name).states[i].params) for i in (0, -1))
        path = "distill/teacher_0/projection/kernel"
        assert first[path].shape == (16, 24) and not np.array_equal(first[path], last[path])
        assert path not in flatten(baked(trained(name)).params)


# Pairs ---------------------------------------------------------------------------------------------------------------

QUANTIZING = ("qat", "lsq", "pact")
SPARSE, BY_GRADIENT = ("magnitude", "movement", "regrow", "taylor"), ("movement", "regrow", "taylor")
REFUSED = {
    **{(name, "structured"): r"layers_0/.*prune first" for name in QUANTIZING},
    **{(name, "l0"): "both claim the bits of layers_0/attention/output/kernel" for name in QUANTIZING},
    **{("l0", name): "both claim the bits of layers_0/attention/output/kernel" for name in QUANTIZING},
    ("l0", "structured"): "both claim the width of layers_0/",
    ("structured", "l0"): "both claim the width of layers_0/",
    ("structured", "lsq"): "groups would fall apart",
    ("pact", "lora"): "both claim the update",
    **dict.fromkeys(itertools.permutations(SPARSE, 2), "both claim the sparsity of"),
    **{pair: "both claim the update of" for name in BY_GRADIENT for pair in ((name, "lora"), ("lora", name))},
}
"""Scales of a quantization span what pruning removes (the other order is fine, without groups); an update beside
clipped inputs cannot be merged. A width has one owner; gates that may stay half open go into weights that nothing
quantizes. LoRA freezes the weight whose gradient would be the score."""


def perturbed(params, method, seed):
    """As an optimizer that knows nothing would leave them."""
    key = jax.random.key(seed)
    values, learns = arrays(params), trained_names(describe(params), [method.trainable])
    return with_arrays(params, values | {n: values[n] + 0.05 * jax.random.normal(key, values[n].shape) for n in learns})


# What these four do is known well enough to be looked for; that all others compose is in test_composition.py.
@pytest.mark.parametrize(
    ("first", "second"), list(itertools.permutations(("lora", "magnitude", "qat", "structured"), 2))
)
def test_pairs_compose_or_are_refused(first, second):
    """Each has its effect whatever the order, and the baked model is the evaluated one."""
    if (first, second) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[first, second]):
            prepared("gpt2", (first, second))
        return
    if first in QUANTIZING and second in QUANTIZING:
        with pytest.raises(ValueError, match=rf"{second} and {first} both claim the bits of embed/tokens/embedding"):
            prepared("gpt2", (first, second))
        return
    method, (lm, constants, state) = prepared("gpt2", (first, second))
    params = lm.network.run_view(lm.params)

    def follow(before, params, state, number):
        grads = {name: jnp.sin(1e3 * a) for name, a in arrays(before).items() if a.dtype == jnp.float32}
        return method.update(Step(params, [], state, before), grads, constants, number)

    update = quick(follow)
    for number in (1, 2):
        moved = perturbed(params, method, number)
        params, _, state, _ = update(params, moved, state, number)
    masks = [a for name, a in arrays(params).items() if name.endswith("mask")]
    expected = logits(lm.network, method.eval_params(params, state))
    lm = method.bake(lm.replace(params=canonical_view(params)), state)
    flat = flatten(lm.params)
    assert flat.keys() == lm.axes.keys() == flatten(lm.network.abstract()).keys()
    assert np.abs(logits(lm.network, lm.params) - expected).max() <= 2e-5 * max(np.abs(expected).max(), 1)
    assert not any(isinstance(leaf, LowRank | Masked) for leaf in flat.values())
    up = flat["layers_0/mlp/up/kernel"]
    if "structured" in (first, second):
        assert lm.config.num_heads == (2, 2) and lm.config.ffn_size == (9, 9)
    if {first, second} & set(SPARSE):
        assert masks and all(np.mean(mask) == 0.5 for mask in masks)
        assert {"structured", "l0"} & {first, second} or np.mean(materialize(up) == 0) >= 0.5
    assert isinstance(up, Quantized) == (first in QUANTIZING or second in QUANTIZING)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_a_method_adds_is_saved_beside_its_base(name, tmp_path):
    """Leaves and Weights anywhere in the tree come back to the bit, and nothing of the base is stored again."""
    base = student("gpt2")
    _, (lm, _, _) = prepared("gpt2", (name,))
    if arrays(lm.params).keys() == arrays(base.params).keys():
        with pytest.raises(ValueError, match="there is no adapter to write"):
            jaxlm.save(lm, tmp_path, base=base)
        return
    jaxlm.save(lm, tmp_path, base=base)
    assert (
        not {*arrays(base.params), *(f"{path}.base" for path in flatten(base.params))} & open_tensors(tmp_path).keys()
    )
    again = jaxlm.load(tmp_path, base=base)
    assert jax.tree.structure(again.params) == jax.tree.structure(lm.params)
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), again.params, lm.params)
    assert all(jax.tree.leaves(same)) and again.axes == lm.axes


@pytest.mark.parametrize("name", ARGUMENTS)
def test_twice_the_same_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name}.*(drop one|merge the two)"):
        prepared("gpt2", (name, name))


def test_claims_of_a_chain_are_those_of_its_methods():
    lora = method_of("lora", ARGUMENTS["lora"])
    with pytest.raises(ValueError, match="lora and inner both claim the update of layers_0/attention/query/kernel"):
        chain([("inner", chain([("lora", lora)])), ("lora", lora)]).init(jax.random.key(0), student("gpt2"))


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "lorra"}, "did you mean 'lora'"),
        ({"name": "magnitude", "sparsity": 0.5}, "needs end"),
        ({"name": "magnitude", "end": 5}, "sparsity must be in"),
        ({"name": "magnitude", "sparsity": 1.0, "end": 5}, "sparsity must be in"),
        ({"name": "magnitude", "sparsity": 0.5, "end": 0}, "no interval"),
        ({"name": "magnitude", "sparsity": 0.5, "begin": 9, "end": 5}, "no interval"),
        ({"name": "structured", "ffn": 0.5, "end": 5, "every": 0}, "every must be"),
        ({"name": "structured", "ffn": 1.0, "end": 5}, "share of ffn"),
        ({"name": "lora", "rnak": 4}, "did you mean 'rank'"),
        ({"name": "lora", "rank": 0}, "rank must be at least 1"),
        ({"name": "qat", "bits": "in4"}, "qat: unknown number format 'in4'; did you mean 'int4'"),
        ({"name": "qat", "bits": "nf4", "symmetric": False}, "qat: nf4 is symmetric by construction"),
        ({"name": "qat", "bits": "nf4", "dynamic": True}, "qat: nf4 codes are places in a table"),
        ({"name": "qat", "activations": {"group": "tensor"}}, "pact learns one range"),
        ({"name": "lsq", "activations": {"bit": "int8"}}, "did you mean 'bits'"),
        ({"name": "lsq", "bits": "fp8_e4m3"}, "lsq: LSQ learns the step of symmetric integers"),
        ({"name": "pact", "clip": -1.0}, "pact: PACT: the bound of the inputs must be positive"),
        ({"name": "pact", "input_bits": "fp8_e4m3"}, "pact: inputs in fp8_e4m3 do not go with a weight in int8"),
    ],
)
def test_wrong_entries_say_what_is_wrong(entry, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        registry.make(registry.METHODS, entry, "methods")


def test_an_entry_needs_a_name():
    with pytest.raises(ValueError, match=r"config\.methods needs a name; known: .*lora"):
        registry.make(registry.METHODS, {"rank": 4}, "methods")


@pytest.mark.parametrize("name", ["lora", "magnitude", *QUANTIZING])
def test_targets_that_match_nothing_are_refused(name):
    method = method_of(name, {**ARGUMENTS[name], "targets": r".*/kernal"})
    with pytest.raises(ValueError, match=rf"{name}: targets.* .*kernal.* match(es)? no parameter"):
        method.init(jax.random.key(0), student("gpt2"))


def test_qat_of_what_is_quantized_is_refused():
    quantized = registry.operate({"name": "quantize"}, student("gpt2"))
    with pytest.raises(ValueError, match=r"qat: .* is rounded already \(Quantized\)"):
        method_of("qat", {}).init(jax.random.key(0), quantized)


# Unbaked ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARGUMENTS)
def test_unbaked_models_save_and_load(name, tmp_path):
    """What `config.bake = False` keeps: gates, factors, projections and constraints, with the axes of each."""
    lm = unbaked(trained(name))
    jaxlm.save(lm, tmp_path / "m")
    again = jaxlm.load(tmp_path / "m")
    assert equal(again.params, lm.params) and again.axes == lm.axes
    nodes, nodes_again = (
        {path: type(leaf) for path, leaf in flatten(params).items() if isinstance(leaf, Node)}
        for params in (lm.params, again.params)
    )
    assert nodes_again == nodes
