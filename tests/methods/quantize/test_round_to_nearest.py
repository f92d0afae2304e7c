"""Surgery that quantizes: number formats, tables and heads, static inputs, files, a budget for mixed precision."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import (
    NO_DATA,
    Calibration,
    Quantized,
    Scheme,
    SurgeryContext,
    arrays,
    flatten,
    map_leaves,
    materialize,
    unflatten,
)
from jaxlm.evaluate.cost import bytes_by_dtype, bytes_on_disk
from jaxlm.io.lm import LM
from jaxlm.methods.prune.structured.gates import open_gates
from jaxlm.methods.quantize.formats import stored_bytes
from jaxlm.methods.quantize.learned import LSQ
from jaxlm.methods.quantize.mixed_precision import Choice, allocate
from jaxlm.models import model_config
from jaxlm.runner import registry

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 48}


@functools.cache
def lm_of(family="gpt2", **fields):
    positions = {"max_positions": 16} if family in ("gpt2", "bert") else {}
    lm = LM.initialize(model_config(family, **{**SIZES, **positions, **fields}), jax.random.key(0))
    noise = lambda path, a: a + 0.1 * jax.random.normal(jax.random.key(len(path)), a.shape)  # noqa: E731
    return lm.replace(params=map_leaves(noise, lm.params))


def operate(name, lm, context=NO_DATA, **options):
    return registry.operate({"name": name, **options}, lm, context)


quantize = functools.partial(operate, "quantize")


def batch(rows=4, length=8):
    rng = np.random.default_rng(0)
    mask = (np.arange(length) < np.array([8, 3, 6, 8])[:rows, None]).astype(np.int32)
    ids = rng.integers(0, 40, (rows, length)) * mask
    return {"input_ids": ids.astype(np.int32), "attention_mask": mask}


def logits(lm):
    return np.asarray(lm.network.forward(lm.params, batch())["logits"])[batch()["attention_mask"] > 0]


# Quantization ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_tables_and_heads_are_quantized_tied_or_not(tied):
    lm = lm_of(tie_embeddings=tied)
    small = quantize(lm)
    flat = flatten(small.params)
    assert isinstance(flat["embed/tokens/embedding"], Quantized) and flat["embed/tokens/embedding"].channel == -2
    assert ("head/output/kernel" in flat) == (not tied)
    assert all(isinstance(leaf, Quantized) == ("kernel" in p or "tokens" in p) for p, leaf in flat.items())
    exact = logits(lm)
    assert np.abs(logits(small) - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.full
def test_finer_formats_change_the_answers_less():
    lm = lm_of()
    exact = logits(lm)

    def change(**options):
        return np.abs(logits(quantize(lm, **options)) - exact).mean()

    int4 = [change(bits="int4", group=group) for group in (8, None, "tensor")]
    assert int4 == sorted(int4) and change(bits="int8") < int4[0]
    assert change(bits="nf4", group=8) < int4[0]
    assert change(bits="fp8_e4m3") < change(bits="fp8_e5m2")
    assert change(bits="int8", dynamic=False) < change(bits="int8", dynamic=True) < 5 * change(bits="int8", group=8)


def test_inputs_are_quantized_for_int8_by_default():
    kernel = lambda **options: flatten(quantize(lm_of(), **options).params)["layers_0/mlp/up/kernel"]  # noqa: E731
    assert kernel().activations == Scheme("int8") and kernel(dynamic=False).activations is None
    assert kernel(bits="int4").activations is None
    assert kernel(bits="int4", dynamic=True).activations == Scheme("int8")
    assert kernel(bits="fp8_e5m2", dynamic=True).activations == Scheme("fp8_e4m3")
    assert kernel(activations={"symmetric": False}).activations == Scheme("int8", None, False)


def test_static_inputs_take_the_first_range_that_matches():
    rules = ((r".*mlp/up/kernel", (-1.0, 3.0)), (r".*", (-2.0, 2.0)))
    small = quantize(lm_of(), activations={"group": "tensor", "symmetric": False}, input_ranges=rules)
    up, down = (flatten(small.params)[f"layers_0/mlp/{name}/kernel"] for name in ("up", "down"))
    assert up.input_scale == pytest.approx(4 / 255)
    assert down.input_scale == pytest.approx(4 / 255)
    assert down.input_zero != up.input_zero
    assert np.isfinite(logits(small)).all()


def test_what_is_stored_as_codes_stays():
    first = quantize(lm_of(), targets=r"embed/tokens/embedding")
    both = flatten(quantize(first, bits="int4", group=8).params)
    assert both["embed/tokens/embedding"].scheme == Scheme("int8")
    assert both["layers_0/mlp/up/kernel"].scheme == Scheme("int4", 8)


def test_channels_may_be_pruned_and_groups_may_not_fall_apart():
    lm = lm_of()
    pruned = operate("prune", quantize(lm, bits="int4"), ffn=0.5)
    assert flatten(pruned.params)["layers_0/mlp/down/kernel"].shape == (24, 32)
    with pytest.raises(ValueError):
        operate("prune", quantize(lm, bits="int4", group=16), ffn=0.5)
    method = registry.make(registry.METHODS, {"name": "lsq", "group": 16}, "methods")
    with pytest.raises(ValueError, match=r"layers_0/mlp/gate will remove inputs of layers_0/mlp/down/kernel"):
        method.init(jax.random.key(0), open_gates(lm, ["ffn"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "int9"}, r"quantize: unknown number format 'int9'"),
        ({"bits": "nf4", "dynamic": True}, r"quantize: nf4 codes are places in a table"),
        ({"bits": "fp8_e4m3", "symmetric": False}, r"quantize: fp8_e4m3 is symmetric by construction"),
        ({"dynamic": False, "activations": {}}, r"activations gives them a format"),
        ({"activations": {"group": "tensor"}}, r"no rule of input_ranges gives the inputs of embed/tokens"),
        ({"input_ranges": ((r".*", (0, 1)),)}, r"input_ranges are for static inputs"),
        ({"activations": {"group": "tensor"}, "input_ranges": ((r"x", (0, 1)),)}, r"the rule 'x' matches no parameter"),
        ({"targets": r".*/kernal"}, r"quantize: targets: the rule '.*kernal' matches no parameter"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        quantize(lm_of(), **options)


# Files ---------------------------------------------------------------------------------------------------------------

STORED = [
    ("int4", {"bits": "int4", "group": 16, "symmetric": False}),
    ("int4", {"bits": "nf4", "group": 16}),
    ("float8_e4m3fn", {"bits": "fp8_e4m3"}),
    ("int8", {"activations": {"symmetric": False}}),
]


@pytest.mark.parametrize(("dtype", "options"), STORED)
def test_files_are_packed_and_load_exactly(tmp_path, dtype, options):
    small = quantize(lm_of(), **options)
    assert "transformers has no Quantized" in jaxlm.save(small, tmp_path)
    again = jaxlm.load(tmp_path)
    before, after = arrays(small.params), arrays(again.params)
    assert jax.tree.structure(again.params) == jax.tree.structure(small.params)
    for name in before:
        assert before[name].dtype == after[name].dtype and np.array_equal(before[name], after[name]), name
    leaves = flatten(small.params).values()
    codes = sum(leaf.codes.size for leaf in leaves if isinstance(leaf, Quantized))
    zeros = sum(leaf.zero.size for leaf in leaves if getattr(leaf, "zero", None) is not None)
    assert bytes_by_dtype(tmp_path)[dtype] == codes * (0.5 if dtype == "int4" else 1)
    assert zeros == (0 if "symmetric" not in options else bytes_by_dtype(tmp_path)["int8"])
    assert sum(bytes_by_dtype(tmp_path).values()) == sum(map(stored_bytes, leaves))
    assert np.array_equal(logits(again), logits(small))


def test_a_packed_dimension_may_be_odd(tmp_path):
    small = quantize(lm_of(vocab_size=41, ffn_size=47), bits="int4", group=16)
    jaxlm.save(small, tmp_path, max_shard_bytes=3000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for name, value in arrays(jaxlm.load(tmp_path).params).items():
        assert np.array_equal(value, arrays(small.params)[name]), name


def test_packed_tensors_are_plain_bytes_to_others(tmp_path):
    from safetensors.numpy import load_file

    small = quantize(lm_of(), bits="int4")
    jaxlm.save(small, tmp_path)
    name = "layers_0/mlp/up/kernel.codes"
    stored, codes = load_file(tmp_path / "model.safetensors")[name], np.asarray(arrays(small.params)[name]).astype(int)
    assert stored.dtype == np.uint8 and stored.shape == (32, 24)
    assert np.array_equal(stored & 15, codes[:, ::2] & 15) and np.array_equal(stored >> 4, codes[:, 1::2] & 15)


def test_a_packed_tensor_that_does_not_fit_is_refused(tmp_path):
    jaxlm.save(quantize(lm_of(), bits="int4"), tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["layers_0/mlp/up/kernel.codes"] = "int4[32,99]"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(
        ValueError, match=r"up/kernel.codes' should hold int4 \[32, 99\] packed, but is uint8 \[32, 24\]"
    ):
        jaxlm.load(tmp_path)


def test_training_checkpoints_hold_codes_of_four_bits(tmp_path):
    from jaxlm.io.checkpoint import Checkpoints

    state = {"a": Quantized.of(jnp.arange(12.0).reshape(3, 4) - 5, Scheme("int4")).codes, "b": jnp.ones(2)}
    state["c"] = Quantized.of(state["a"].astype(jnp.float32), Scheme("nf4")).codes
    state["d"] = Quantized.of(state["a"].astype(jnp.float32), Scheme("fp8_e4m3")).codes
    store = Checkpoints(tmp_path / "checkpoints")
    store.save(1, state, {})
    store.close()
    shapes = jax.eval_shape(lambda: state)
    again = Checkpoints(tmp_path / "checkpoints").restore(shapes)
    restored = next(part for part in again if isinstance(part, dict) and "a" in part)
    for name, value in state.items():
        assert restored[name].dtype == value.dtype and np.array_equal(restored[name], value)


# Mixed precision -----------------------------------------------------------------------------------------------------


def cheapest(choices, budget):
    """The best allocation by trying all."""
    best = None
    for taken in itertools.product(*choices.values()):
        if sum(c.bytes for c in taken) <= budget:
            error = sum(c.error for c in taken)
            best = error if best is None else min(best, error)
    return best


@pytest.mark.parametrize("seed", range(6))
def test_allocation_is_close_to_the_best_and_never_too_large(seed):
    rng = np.random.default_rng(seed)
    choices = {}
    for i in range(6):
        size, weight = rng.integers(5, 40), rng.uniform(0.1, 5)
        choices[f"leaf{i}"] = [Choice(int(size * b), weight * rng.uniform(0.7, 1.3) * 4.0**-b) for b in (3, 4, 8)]
        choices[f"leaf{i}"].append(Choice(int(size * 32), 0.0))
    least, most = (sum(f(c.bytes for c in offers) for offers in choices.values()) for f in (min, max))
    for budget in np.linspace(least, most, 9).astype(int):
        taken = allocate(choices, budget)
        assert sum(choices[p][i].bytes for p, i in taken.items()) <= budget
        error = sum(choices[p][i].error for p, i in taken.items())
        first = sum(offers[0].error for offers in choices.values())
        assert error <= cheapest(choices, budget) + 0.1 * first
    assert set(allocate(choices, most).values()) == {3}
    with pytest.raises(ValueError, match=f"the smallest formats take {least}"):
        allocate(choices, least - 1)


def test_steps_of_the_hull_that_fit_exactly_are_the_best():
    choices = {"a": [Choice(1, 9.0), Choice(2, 8.9), Choice(3, 1.0)], "b": [Choice(1, 5.0), Choice(2, 1.0)]}
    for budget in (2, 3, 5):
        taken = allocate(choices, budget)
        assert sum(choices[p][i].error for p, i in taken.items()) == cheapest(choices, budget)


def context_of(batch):
    return SurgeryContext(read_calibration=lambda lm: Calibration((batch,)))


@pytest.mark.parametrize("name", ["mixed_precision", "mixed_precision_weights"])
@pytest.mark.parametrize("budget", [0.25, 0.5])
def test_mixed_precision_keeps_the_budget_and_beats_one_format_of_its_size(tmp_path, name, budget):
    flat = flatten(lm_of().params)
    flat["layers_1/mlp/down/kernel"] = flat["layers_1/mlp/down/kernel"].at[0, 0].set(40.0)  # an outlier to spare
    lm = lm_of().replace(params=unflatten(flat))
    mixed = operate(name, lm, context_of(batch()) if name == "mixed_precision" else NO_DATA, budget=budget)
    jaxlm.save(lm, tmp_path / "whole", native=True)
    jaxlm.save(mixed, tmp_path / "mixed")
    whole_size, mixed_size = (sum(bytes_by_dtype(tmp_path / name).values()) for name in ("whole", "mixed"))
    assert mixed_size <= budget * whole_size <= mixed_size + 0.15 * whole_size
    kinds = {getattr(leaf, "scheme", None) for path, leaf in flatten(mixed.params).items() if path.endswith("kernel")}
    assert len(kinds) > 1
    error = lambda changed: np.abs(logits(changed) - logits(lm)).mean()  # noqa: E731
    assert error(mixed) < error(quantize(lm, bits="int3", group=32))


def test_budgets_that_cannot_be_met():
    mixed_precision = functools.partial(operate, "mixed_precision_weights", lm_of())
    with pytest.raises(ValueError, match=r"budget 0.05 of \d+ bytes cannot be met, the least is 0\.\d+"):
        mixed_precision(budget=0.05)
    with pytest.raises(ValueError, match="a share in"):
        mixed_precision(budget=2)
    with pytest.raises(ValueError, match="a choice has no field 'bit'"):
        mixed_precision(budget=0.5, choices=({"bit": "int4"},))


def test_only_real_tokens_count_in_the_sensitivity():
    """Padding holds other ids: the same formats are chosen."""
    padded = batch() | {"input_ids": np.where(batch()["attention_mask"], batch()["input_ids"], 7)}
    one, other = (
        operate("mixed_precision", lm_of(), context_of(data), budget=0.3).params for data in (batch(), padded)
    )
    assert jax.tree.structure(one) == jax.tree.structure(other)


@pytest.mark.parametrize("family", ["bert"])
def test_mixed_precision_of_a_classifier_and_of_a_regression(family):
    for fields in ({"head": "sequence", "labels": ("a", "b", "c")}, {"head": "sequence", "regression": True}):
        lm = lm_of(family, **fields)
        mixed = operate("mixed_precision", lm, context_of(batch()), budget=0.4)
        before, after = (sum(map(stored_bytes, flatten(model.params).values())) for model in (lm, mixed))
        assert after <= 0.4 * before


# Training ------------------------------------------------------------------------------------------------------------


def test_learned_steps_survive_saving(tmp_path):
    wrap = lambda path, leaf: LSQ.of(leaf, Scheme("int4", 8)) if path.endswith("up/kernel") else leaf  # noqa: E731
    lm = lm_of().replace(params=map_leaves(wrap, lm_of().params))
    jaxlm.save(lm, tmp_path)
    before, after = (flatten(params)["layers_0/mlp/up/kernel"] for params in (lm.params, jaxlm.load(tmp_path).params))
    assert isinstance(after, LSQ) and np.array_equal(after.scale, before.scale)
    assert np.array_equal(materialize(after), materialize(before))
    assert bytes_on_disk(tmp_path) > 0
