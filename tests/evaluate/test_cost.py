import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxlm.core import Gate, Masked, Quantized
from jaxlm.evaluate.cost import (
    bytes_by_dtype,
    bytes_on_disk,
    flops_per_token,
    flops_per_token_of_pairs,
    parameters,
)
from jaxlm.methods.peft.low_rank import LowRank

HIDDEN, FFN, VOCAB, POSITIONS, T = 8, 32, 50, 16, 16


def model(layers=2, heads=(2, 2), head_dim=4, tied=True):
    """A small decoder: only shapes matter here."""
    tree = {
        "embed": {
            "tokens": {"embedding": jnp.ones((VOCAB, HIDDEN))},
            "positions": {"embedding": jnp.ones((POSITIONS, HIDDEN))},
        },
        "final_norm": {"scale": jnp.ones(HIDDEN)},
    }
    for i in range(layers):
        width = heads[i] * head_dim
        tree[f"layers_{i}"] = {
            "attention": {
                **{name: {"kernel": jnp.ones((HIDDEN, width))} for name in ("query", "key", "value")},
                "output": {"kernel": jnp.ones((width, HIDDEN)), "bias": jnp.ones(HIDDEN)},
            },
            "mlp": {"up": {"kernel": jnp.ones((HIDDEN, FFN))}, "down": {"kernel": jnp.ones((FFN, HIDDEN))}},
        }
    if not tied:
        tree["head"] = {"kernel": jnp.ones((HIDDEN, VOCAB))}
    return tree


def kernels(layers=2, width=8):
    return layers * (4 * HIDDEN * width + 2 * HIDDEN * FFN)


def test_parameters_by_hand():
    total, rest = parameters(model())
    assert rest == kernels() + 2 * HIDDEN + HIDDEN
    assert total == rest + (VOCAB + POSITIONS) * HIDDEN


def test_a_weight_counts_as_the_matrix_it_stands_for_and_a_low_rank_update_adds_to_it():
    w = jnp.ones((HIDDEN, FFN))
    for leaf, extra in (
        (Masked(w, w > 0), 0),
        (Quantized.of(w), 0),
        (LowRank(Quantized.of(w), jnp.ones((HIDDEN, 3)), jnp.ones((3, FFN))), 3 * (HIDDEN + FFN)),
        (jax.ShapeDtypeStruct(w.shape, w.dtype), 0),
    ):
        tree = model()
        before = flops_per_token(tree, context=T, heads=(2, 2), head_dim=4, causal=True, tied_head=True)
        assert parameters({"up": {"kernel": leaf}}).total == HIDDEN * FFN + extra
        tree["layers_0"]["mlp"]["up"]["kernel"] = leaf
        after = flops_per_token(tree, context=T, heads=(2, 2), head_dim=4, causal=True, tied_head=True)
        assert after - before == 2 * extra


def test_a_gate_is_no_parameter():
    tree = model()
    tree["layers_0"]["attention"]["gate"] = Gate(jnp.ones((2, 1, 1)))
    assert parameters(tree) == parameters(model())


@pytest.mark.parametrize("causal", [True, False])
def test_flops_by_hand_count_the_head_once_tied_or_not(causal):
    attention = 4 * (2 + 1) * 4 * T // (2 if causal else 1)
    for tied in (True, False):
        tree = model(heads=(2, 1), tied=tied)
        products = kernels(1, 8) + kernels(1, 4) + HIDDEN * VOCAB
        found = flops_per_token(tree, context=T, heads=(2, 1), head_dim=4, causal=causal, tied_head=tied)
        assert found == 2 * products + attention


def test_flops_are_those_that_the_compiler_counts_for_the_products():
    """XLA counts every operation, so the products are compared: a forward pass of matrix products alone, unscanned."""
    tree = model()

    def forward(tree, x):  # full attention without softmax: [T, hidden] -> [T, vocab]
        for i in range(2):
            layer = tree[f"layers_{i}"]
            q, k, v = ((x @ layer["attention"][n]["kernel"]).reshape(T, 2, 4) for n in ("query", "key", "value"))
            mixed = jnp.einsum("hqk,khd->qhd", jnp.einsum("qhd,khd->hqk", q, k), v).reshape(T, 8)
            x = mixed @ layer["attention"]["output"]["kernel"]
            x = x @ layer["mlp"]["up"]["kernel"] @ layer["mlp"]["down"]["kernel"]
        return x @ tree["embed"]["tokens"]["embedding"].T

    counted = jax.jit(forward).lower(tree, jnp.ones((T, HIDDEN))).compile().cost_analysis()["flops"]
    ours = flops_per_token(tree, context=T, heads=(2, 2), head_dim=4, causal=False, tied_head=True)
    assert counted == pytest.approx(ours * T, rel=0.01)


def test_a_classifier_of_texts_is_applied_once_a_row():
    tree = model(tied=False)
    counts = {"context": T, "heads": (2, 2), "head_dim": 4, "causal": False, "tied_head": False}
    every, once = flops_per_token(tree, **counts), flops_per_token(tree, **counts, once=r"head/.*")
    assert every - once == 2 * HIDDEN * VOCAB - 2 * HIDDEN * VOCAB // T


def test_flops_of_a_pair_are_those_of_its_parts():
    """Source tokens pass the encoder and the keys and values across, target tokens the rest."""
    one = {name: {"kernel": jnp.ones((HIDDEN, 8))} for name in ("query", "key", "value")}
    attention = {**one, "output": {"kernel": jnp.ones((8, HIDDEN))}}
    tree = {
        "embed": {"tokens": {"embedding": jnp.ones((VOCAB, HIDDEN))}},
        "encoder": {"layers_0": {"attention": attention}},
        "decoder": {"layers_0": {"attention": attention, "cross_attention": attention}},
    }
    s, t, matrix = 6, 4, HIDDEN * 8
    found = flops_per_token_of_pairs(tree, lengths=(s, t), heads=((2,), (2,), (2,)), head_dim=4, tied_head=True)
    source, target = (4 + 2) * matrix, (4 + 2) * matrix + HIDDEN * VOCAB
    scores = 4 * 4 * (2 * s * s + 2 * t * t // 2 + 2 * s * t)
    assert found == (2 * (source * s + target * t) + scores) // (s + t)


def test_what_would_be_counted_wrongly_is_refused():
    counts = {"context": T, "head_dim": 4, "causal": True}
    with pytest.raises(ValueError, match="lists 3 layers"):
        flops_per_token(model(), heads=(2, 2, 2), tied_head=True, **counts)
    with pytest.raises(KeyError, match="token table"):
        flops_per_token({"layers_0": model()["layers_0"]}, heads=(2,), tied_head=True, **counts)
    with pytest.raises(ValueError, match="two lengths"):
        flops_per_token({"encoder": model()}, heads=(2, 2), tied_head=False, **counts)
    with pytest.raises(ValueError, match="layers_0-1"):
        parameters({"layers_0-1": {"mlp": {"up": {"kernel": jnp.ones((2, 8, 8))}}}})


def test_bytes_by_dtype_over_shards(tmp_path):
    save_file({"a": np.zeros((3, 5), np.float32), "c": np.zeros(7, np.int8)}, tmp_path / "model-1.safetensors")
    save_file({"b": np.zeros((3, 5), np.int8)}, tmp_path / "model-2.safetensors", metadata={"format": "np"})
    (tmp_path / "config.json").write_text("{}")
    assert bytes_by_dtype(tmp_path) == {"float32": 60, "int8": 22}
    assert bytes_on_disk(tmp_path) == sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) > 82


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a model directory"):
        bytes_by_dtype(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({"a": np.zeros((30, 5), np.float32)}, file)
    whole = file.read_bytes()
    for damaged, why in (
        (whole[:-1], "its tensors should take 600 bytes, 599 are there"),
        (whole[:20], "its header should take"),
        (b"", "truncated"),
        (whole[:8] + b"?" + whole[9:], "not JSON"),
        (len(json.dumps([])).to_bytes(8, "little") + b"[]", "JSON list"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=why) as error:
            bytes_by_dtype(tmp_path)
        assert "model.safetensors" in str(error.value)
