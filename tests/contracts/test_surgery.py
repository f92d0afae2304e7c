"""What every calibrated surgery of matrices promises, checked over the registry; a new one joins by one line."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import Calibration, SurgeryContext, arrays, describe, flatten, unflatten
from jaxlm.io.lm import LM
from jaxlm.methods.calibration import KERNELS
from jaxlm.models import model_config
from jaxlm.runner import registry
from tests.contracts.small_models import quick
from tests.contracts.test_composition import ENTRIES, SHARED, Entry, student

pytestmark = pytest.mark.slow

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
DENSE = LM.initialize(
    model_config("llama", vocab_size=19, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2), jax.random.key(0)
)
BATCH = {"input_ids": np.random.default_rng(0).integers(1, 19, (4, 6)), "attention_mask": np.ones((4, 6), np.int32)}


class CalibrationRead(Exception):
    """A surgery asked for calibration data."""


def reads_calibration(entry: Entry) -> bool:
    """Whether a surgery with typical options does."""

    def read(lm):
        raise CalibrationRead

    try:
        registry.operate({"name": entry.name, **entry.arguments}, student(), SurgeryContext(read))
    except CalibrationRead:
        return True
    except ValueError as error:
        assert entry.name in SHARED, error  # no layers are shared here
    return False


def test_every_calibrated_surgery_is_here():
    calibrated = {entry.name for entry in ENTRIES if entry.section == "surgery" and reads_calibration(entry)}
    assert ARGUMENTS.keys() == calibrated - STRUCTURAL, "a new surgery needs one line in ARGUMENTS"


def compress(name, params=DENSE.params, batch=BATCH):
    context = SurgeryContext(lambda lm: Calibration([batch]))
    return registry.operate({"name": name, **ARGUMENTS[name]}, DENSE.replace(params=params), context)


@functools.cache
def compressed(name):
    return compress(name)


def finite(params):
    return all(np.isfinite(np.asarray(a, np.float32)).all() for a in arrays(params).values())


@quick
def logits(params):
    return DENSE.network.forward(params, BATCH)["logits"]


@every
def test_only_kernels_change_and_everything_has_names(name):
    lm = compressed(name)
    before, after = flatten(DENSE.params), flatten(lm.params)
    assert lm.config == DENSE.config and after.keys() == before.keys() and finite(lm.params)
    for path, leaf in after.items():
        assert tuple(leaf.shape) == before[path].shape, path
        inside = "layers_" in path and (path.endswith("kernel") or "norm/" in path)
        assert inside or leaf is before[path], path
    infos, values = describe(lm.params, lm.axes), arrays(lm.params)
    assert all(len(info.axes) == values[name].ndim for name, info in infos.items())


@every
def test_the_result_is_a_model(name, tmp_path):
    """It scans, it is saved and loaded, and it computes something near what it did."""
    lm = compressed(name)
    expected = logits(lm.params)
    assert np.allclose(logits(lm.network.run_view(lm.params)), expected, atol=1e-5)
    jaxlm.save(lm, tmp_path / "model")
    assert np.array_equal(logits(jaxlm.load(tmp_path / "model").params), expected)
    moved = np.linalg.norm(expected - logits(DENSE.params)) / np.linalg.norm(logits(DENSE.params))
    assert moved < 0.9


@every
def test_degenerate_calibration(name):
    """One token, and dead inputs: numbers all the same, or an error that names the layer."""
    one = {"input_ids": BATCH["input_ids"], "attention_mask": np.zeros((4, 6), np.int32)}
    one["attention_mask"][2, 0] = 1
    dead = flatten(DENSE.params)
    dead["layers_0/attention_norm/scale"] = dead["layers_0/attention_norm/scale"].at[jnp.array([0, 7])].set(0)
    for params, batch in ((DENSE.params, one), (unflatten(dead), BATCH)):
        assert finite(compress(name, params, batch).params)
    silent = unflatten(dead | {"layers_1/mlp_norm/scale": jnp.zeros(16)})
    try:
        assert finite(compress(name, silent).params)
    except ValueError as error:
        assert f"{name}: every input of layers_1/mlp/" in str(error)
