"""What every calibrated surgery of matrices promises, checked over the registry; a new one joins by one line."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import arrays, describe, flatten, unflatten
from jaxlm.io.pretrained import LM
from jaxlm.methods.calibration import KERNELS, Calibration
from jaxlm.models import model_config
from jaxlm.models.network import Network
from jaxlm.runner import registry

# Compiling takes most of the time here, so it is told not to optimize.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
# One line enrols a new surgery.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "activation_svd": {"size": 0.5},
    "awq": {"group": 8},
    "gptq": {"group": 8},
    "mixed_precision": {"budget": 0.6, "targets": KERNELS},
    "quantize_static": {},
    "smoothquant": {"alpha": 0.4},
    "sparsegpt": {"sparsity": 0.5},
    "wanda": {"pattern": "2:4"},
}
STRUCTURAL = {"drop_layers"}
"""Those that leave another structure: see the tests of structured pruning."""
every = pytest.mark.parametrize("name", ARGUMENTS)
MODEL = Network(model_config("llama", vocab_size=19, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2))
PARAMS = MODEL.init(jax.random.key(0))
BATCH = {"input_ids": np.random.default_rng(0).integers(1, 19, (4, 6)), "attention_mask": np.ones((4, 6), np.int32)}


def test_every_calibrated_surgery_is_here():
    calibrated = {n for n, f in registry.SURGERY.items() if "calibration" in inspect.signature(f).parameters}
    assert ARGUMENTS.keys() == calibrated - STRUCTURAL, "a new surgery needs one line in ARGUMENTS"


def operated(name, params=PARAMS, batch=BATCH):
    entry = {"name": name, **ARGUMENTS[name]}
    offered = {"calibration": lambda: Calibration([batch])}
    return registry.make(
        registry.SURGERY, entry, "surgery", offered, model=MODEL, params=params, axes=dict(MODEL.axes())
    )


@functools.cache
def result(name):
    return operated(name)


def finite(params):
    return all(np.isfinite(np.asarray(a, np.float32)).all() for a in arrays(params).values())


@functools.partial(jax.jit, compiler_options=QUICK)
def logits(params):
    return MODEL.forward(params, BATCH)["logits"]


@every
def test_only_kernels_change_and_everything_has_names(name):
    model, params, axes = result(name)
    assert model == MODEL and flatten(params).keys() == flatten(PARAMS).keys() and finite(params)
    infos = describe(params, axes)
    for path, leaf in flatten(params).items():
        assert tuple(leaf.shape) == flatten(PARAMS)[path].shape, path
        inside = "layers_" in path and (path.endswith("kernel") or "norm/" in path)
        assert inside or leaf is flatten(PARAMS)[path], path
    assert all(len(info.axes) == arrays(params)[array].ndim for array, info in infos.items())


@every
def test_the_result_is_a_model(name, tmp_path):
    """It scans, it is saved and loaded, and it computes something near what it did."""
    model, params, _ = result(name)
    expected = logits(params)
    assert np.allclose(logits(model.run_view(params)), expected, atol=1e-5)
    jaxlm.save(LM(model.config, params), tmp_path / "model")
    assert np.array_equal(logits(jaxlm.load(tmp_path / "model").params), expected)
    moved = np.linalg.norm(expected - logits(PARAMS)) / np.linalg.norm(logits(PARAMS))
    assert moved < 0.9


@every
def test_degenerate_calibration(name):
    """One token, and dead inputs: numbers all the same, or an error that names the layer."""
    one = {"input_ids": BATCH["input_ids"], "attention_mask": np.zeros((4, 6), np.int32)}
    one["attention_mask"][2, 0] = 1
    dead = flatten(PARAMS)
    dead["layers_0/attention_norm/scale"] = dead["layers_0/attention_norm/scale"].at[jnp.array([0, 7])].set(0)
    for params, batch in ((PARAMS, one), (unflatten(dead), BATCH)):
        assert finite(operated(name, params, batch)[1])
    silent = unflatten(dead | {"layers_1/mlp_norm/scale": jnp.zeros(16)})
    try:
        assert finite(operated(name, silent)[1])
    except ValueError as error:
        assert f"{name}: every input of layers_1/mlp/" in str(error)
