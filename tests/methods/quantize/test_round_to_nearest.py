"""Surgery that rounds: formats of a config, tables and heads, static inputs, files, a budget for mixed precision."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import LSQ, Quantized, Scheme, arrays, flatten, map_leaves, materialize
from jaxlm.evaluate.cost import bytes_by_dtype, bytes_on_disk
from jaxlm.methods.prune.structured.gates import open_gates
from jaxlm.methods.quantize.formats import stored_bytes
from jaxlm.methods.quantize.mixed_precision import Choice, allocate
from jaxlm.models import model_config
from jaxlm.models.network import Network
from jaxlm.runner import registry

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 48}


@functools.cache
def model_of(family="gpt2", **fields):
    own = {"max_positions": 16} if family in ("gpt2", "bert") else {}
    model = Network(model_config(family, **{**SIZES, **own, **fields}))
    noise = lambda path, a: a + 0.1 * jax.random.normal(jax.random.key(len(path)), a.shape)  # noqa: E731
    return model, map_leaves(noise, model.init(jax.random.key(0)))


def operate(name, model, params, **arguments):
    given = {"model": model, "params": params, "axes": model.axes()}
    given |= {"calibration": arguments.pop("calibration")} if "calibration" in arguments else {}
    return registry.make(registry.SURGERY, {"name": name, **arguments}, "surgery", **given)[1]


def batch(rows=4, length=8):
    rng = np.random.default_rng(0)
    mask = (np.arange(length) < np.array([8, 3, 6, 8])[:rows, None]).astype(np.int32)
    ids = rng.integers(0, 40, (rows, length)) * mask
    return {"input_ids": ids.astype(np.int32), "attention_mask": mask}


def logits(model, params):
    return np.asarray(model.forward(params, batch())["logits"])[batch()["attention_mask"] > 0]


# Rounding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_tables_and_heads_are_rounded_tied_or_not(tied):
    model, params = model_of(tie_embeddings=tied)
    found = flatten(operate("quantize", model, params))
    assert isinstance(found["embed/tokens/embedding"], Quantized) and found["embed/tokens/embedding"].channel == -2
    assert ("head/output/kernel" in found) == (not tied)
    assert all(isinstance(leaf, Quantized) == ("kernel" in p or "tokens" in p) for p, leaf in found.items())
    exact, ours = logits(model, params), logits(model, operate("quantize", model, params))
    assert np.abs(ours - exact).max() < 0.1 * np.abs(exact).max()


def test_finer_formats_change_the_answers_less():
    model, params = model_of()
    exact = logits(model, params)

    def change(**options):
        return np.abs(logits(model, operate("quantize", model, params, **options)) - exact).mean()

    int4 = [change(bits="int4", group=group) for group in (8, None, "tensor")]
    assert int4 == sorted(int4) and change(bits="int8") < int4[0]
    assert change(bits="nf4", group=8) < int4[0]
    assert change(bits="fp8_e4m3") < change(bits="fp8_e5m2")
    assert change(bits="int8", dynamic=False) < change(bits="int8", dynamic=True) < 5 * change(bits="int8", group=8)


def test_inputs_are_rounded_for_int8_unless_told_otherwise():
    model, params = model_of()
    kernel = lambda **options: flatten(operate("quantize", model, params, **options))["layers_0/mlp/up/kernel"]  # noqa: E731
    assert kernel().activations == Scheme("int8") and kernel(dynamic=False).activations is None
    assert kernel(bits="int4").activations is None
    assert kernel(bits="int4", dynamic=True).activations == Scheme("int8")
    assert kernel(bits="fp8_e5m2", dynamic=True).activations == Scheme("fp8_e4m3")
    assert kernel(activations={"symmetric": False}).activations == Scheme("int8", None, False)


def test_static_inputs_take_the_first_range_that_matches():
    model, params = model_of()
    rules = ((r".*mlp/up/kernel", (-1.0, 3.0)), (r".*", (-2.0, 2.0)))
    options = {"activations": {"group": "tensor", "symmetric": False}, "input_ranges": rules}
    found = flatten(operate("quantize", model, params, **options))
    assert found["layers_0/mlp/up/kernel"].input_scale == pytest.approx(4 / 255)
    assert found["layers_0/mlp/down/kernel"].input_scale == pytest.approx(4 / 255)
    assert found["layers_0/mlp/down/kernel"].input_zero != found["layers_0/mlp/up/kernel"].input_zero
    assert np.isfinite(logits(model, operate("quantize", model, params, **options))).all()


def test_what_is_stored_as_codes_stays():
    model, params = model_of()
    first = operate("quantize", model, params, targets=r"embed/tokens/embedding")
    both = flatten(operate("quantize", model, first, bits="int4", group=8))
    assert both["embed/tokens/embedding"].scheme == Scheme("int8")
    assert both["layers_0/mlp/up/kernel"].scheme == Scheme("int4", 8)


def test_channels_may_be_pruned_and_groups_may_not_fall_apart():
    model, params = model_of()
    pruned = operate("prune", model, operate("quantize", model, params, bits="int4"), ffn=0.5)
    assert flatten(pruned)["layers_0/mlp/down/kernel"].shape == (24, 32)
    with pytest.raises(ValueError):
        operate("prune", model, operate("quantize", model, params, bits="int4", group=16), ffn=0.5)
    gated, axes = open_gates(model, params, model.axes(), ["ffn"])
    method = registry.make(registry.METHODS, {"name": "lsq", "group": 16}, "methods")
    with pytest.raises(ValueError, match=r"layers_0/mlp/gate will remove inputs of layers_0/mlp/down/kernel"):
        method.init(jax.random.key(0), model, gated, axes)


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
    model, params = model_of()
    with pytest.raises(ValueError, match=message):
        operate("quantize", model, params, **options)


# Files ---------------------------------------------------------------------------------------------------------------

STORED = [
    ("int4", {"bits": "int4", "group": 16, "symmetric": False}),
    ("int4", {"bits": "nf4", "group": 16}),
    ("float8_e4m3fn", {"bits": "fp8_e4m3"}),
    ("int8", {"activations": {"symmetric": False}}),
]


@pytest.mark.parametrize(("dtype", "options"), STORED)
def test_files_are_packed_and_load_exactly(tmp_path, dtype, options):
    model, params = model_of()
    params = operate("quantize", model, params, **options)
    assert "transformers has no Quantized" in jaxlm.save(jaxlm.LM(model.config, params), tmp_path)
    again = jaxlm.load(tmp_path).params
    before, after = arrays(params), arrays(again)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for name in before:
        assert before[name].dtype == after[name].dtype and np.array_equal(before[name], after[name]), name
    codes = sum(leaf.codes.size for leaf in flatten(params).values() if isinstance(leaf, Quantized))
    zeros = sum(leaf.zero.size for leaf in flatten(params).values() if getattr(leaf, "zero", None) is not None)
    assert bytes_by_dtype(tmp_path)[dtype] == codes * (0.5 if dtype == "int4" else 1)
    assert zeros == (0 if "symmetric" not in options else bytes_by_dtype(tmp_path)["int8"])
    assert sum(bytes_by_dtype(tmp_path).values()) == sum(map(stored_bytes, flatten(params).values()))
    assert np.array_equal(logits(model, again), logits(model, params))


def test_a_packed_dimension_may_be_odd(tmp_path):
    model, params = model_of(vocab_size=41, ffn_size=47)
    params = operate("quantize", model, params, bits="int4", group=16)
    jaxlm.save(jaxlm.LM(model.config, params), tmp_path, max_shard_bytes=3000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for name, value in arrays(jaxlm.load(tmp_path).params).items():
        assert np.array_equal(value, arrays(params)[name]), name


def test_packed_tensors_are_plain_bytes_to_others(tmp_path):
    from safetensors.numpy import load_file

    model, params = model_of()
    params = operate("quantize", model, params, bits="int4")
    jaxlm.save(jaxlm.LM(model.config, params), tmp_path)
    name = "layers_0/mlp/up/kernel.codes"
    stored, codes = load_file(tmp_path / "model.safetensors")[name], np.asarray(arrays(params)[name]).astype(int)
    assert stored.dtype == np.uint8 and stored.shape == (32, 24)
    assert np.array_equal(stored & 15, codes[:, ::2] & 15) and np.array_equal(stored >> 4, codes[:, 1::2] & 15)


def test_a_packed_tensor_that_does_not_fit_is_refused(tmp_path):
    model, params = model_of()
    jaxlm.save(jaxlm.LM(model.config, operate("quantize", model, params, bits="int4")), tmp_path)
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
    found = next(part for part in again if isinstance(part, dict) and "a" in part)
    for name, value in state.items():
        assert found[name].dtype == value.dtype and np.array_equal(found[name], value)


# Mixed precision -----------------------------------------------------------------------------------------------------


def cheapest(choices, budget):
    """The best allocation by trying all."""
    best = None
    for picks in itertools.product(*(range(len(own)) for own in choices.values())):
        taken = [own[i] for own, i in zip(choices.values(), picks, strict=True)]
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
    least, most = (sum(f(c.bytes for c in own) for own in choices.values()) for f in (min, max))
    for budget in np.linspace(least, most, 9).astype(int):
        taken = allocate(choices, budget)
        assert sum(choices[p][i].bytes for p, i in taken.items()) <= budget
        error = sum(choices[p][i].error for p, i in taken.items())
        first = sum(own[0].error for own in choices.values())
        assert error <= cheapest(choices, budget) + 0.1 * first
    assert set(allocate(choices, most).values()) == {3}
    with pytest.raises(ValueError, match=f"the smallest formats take {least}"):
        allocate(choices, least - 1)


def test_steps_of_the_hull_that_fit_exactly_are_the_best():
    choices = {"a": [Choice(1, 9.0), Choice(2, 8.9), Choice(3, 1.0)], "b": [Choice(1, 5.0), Choice(2, 1.0)]}
    for budget in (2, 3, 5):
        taken = allocate(choices, budget)
        assert sum(choices[p][i].error for p, i in taken.items()) == cheapest(choices, budget)


class Text:
    batches = (batch(),)


@pytest.mark.parametrize("name", ["mixed_precision", "mixed_precision_weights"])
@pytest.mark.parametrize("budget", [0.25, 0.5])
def test_mixed_precision_keeps_the_budget_and_beats_one_format_of_its_size(tmp_path, name, budget):
    model, params = model_of()
    flat = flatten(params)
    flat["layers_1/mlp/down/kernel"] = flat["layers_1/mlp/down/kernel"].at[0, 0].set(40.0)  # an outlier to spare
    params = jaxlm.core.unflatten(flat)
    given = {"calibration": Text} if name == "mixed_precision" else {}
    mixed = operate(name, model, params, budget=budget, **given)
    jaxlm.save(jaxlm.LM(model.config, params), tmp_path / "whole", native=True)
    jaxlm.save(jaxlm.LM(model.config, mixed), tmp_path / "mixed")
    sizes = [sum(bytes_by_dtype(tmp_path / which).values()) for which in ("whole", "mixed")]
    assert sizes[1] <= budget * sizes[0] <= sizes[1] + 0.15 * sizes[0]
    kinds = {getattr(leaf, "scheme", None) for path, leaf in flatten(mixed).items() if path.endswith("kernel")}
    assert len(kinds) > 1
    error = lambda p: np.abs(logits(model, p) - logits(model, params)).mean()  # noqa: E731
    plain = operate("quantize", model, params, bits="int3", group=32)
    assert error(mixed) < error(plain)


def test_budgets_that_cannot_be_met():
    model, params = model_of()
    with pytest.raises(ValueError, match=r"budget 0.05 of \d+ bytes cannot be met, the least is 0\.\d+"):
        operate("mixed_precision_weights", model, params, budget=0.05)
    with pytest.raises(ValueError, match="a share in"):
        operate("mixed_precision_weights", model, params, budget=2)
    with pytest.raises(ValueError, match="a choice has no field 'bit'"):
        operate("mixed_precision_weights", model, params, budget=0.5, choices=({"bit": "int4"},))


def test_only_real_tokens_count_in_the_sensitivity():
    """Padding holds other ids: the same formats are chosen."""
    model, params = model_of()

    class Other:
        batches = ({**batch(), "input_ids": np.where(batch()["attention_mask"], batch()["input_ids"], 7)},)

    one, other = (operate("mixed_precision", model, params, budget=0.3, calibration=c) for c in (Text, Other))
    assert jax.tree.structure(one) == jax.tree.structure(other)


@pytest.mark.parametrize("family", ["bert"])
def test_mixed_precision_of_a_classifier_and_of_a_regression(family):
    for fields in ({"head": "sequence", "labels": ("a", "b", "c")}, {"head": "sequence", "regression": True}):
        model, params = model_of(family, **fields)
        mixed = operate("mixed_precision", model, params, budget=0.4, calibration=Text)
        assert sum(map(stored_bytes, flatten(mixed).values())) <= 0.4 * sum(map(stored_bytes, flatten(params).values()))


# Training ------------------------------------------------------------------------------------------------------------


def test_learned_steps_survive_saving(tmp_path):
    model, params = model_of()
    wrap = lambda path, leaf: LSQ.of(leaf, Scheme("int4", 8)) if path.endswith("up/kernel") else leaf  # noqa: E731
    params = map_leaves(wrap, params)
    jaxlm.save(jaxlm.LM(model.config, params), tmp_path)
    again = flatten(jaxlm.load(tmp_path).params)["layers_0/mlp/up/kernel"]
    assert isinstance(again, LSQ) and np.array_equal(again.scale, flatten(params)["layers_0/mlp/up/kernel"].scale)
    assert np.array_equal(materialize(again), materialize(flatten(params)["layers_0/mlp/up/kernel"]))
    assert bytes_on_disk(tmp_path) > 0
