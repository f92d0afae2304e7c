"""Training starts from whatever a directory holds: every family in bfloat16, every Weight, every number format.

What trains is float32 from the first step on, what is frozen keeps its dtype; both to the end of two steps.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import Weight, arrays, canonical_path, chain, describe, flatten, unflatten
from jaxlm.io.lm import LM
from jaxlm.methods.peft.lora import lora
from jaxlm.models import FAMILIES, model_config
from jaxlm.nn.stack import canonical_view
from jaxlm.parallel import shard_tree
from jaxlm.runner import registry
from jaxlm.runner.sharded_step import ShardedStep, sharded_step
from jaxlm.train.aot_compile import compiled
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import TrainState, create_state, dropout_key
from tests.contracts.one_device import one_device_setup
from tests.contracts.test_weights import STORED

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 19, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "ffn_size": 24}
POSITIONS = {"gpt2": {"max_positions": 8}, "bert": {"max_positions": 8}, "roberta": {"max_positions": 8}}
FULL = bool(os.environ.get("JAXLM_FULL"))
KERNEL = "layers_0/mlp/up/kernel"
FORMATS = [
    *("Quantized", "Quantized, int4 groups", "Quantized, nf4", "Quantized, fp8"),
    *("Masked", "LowRank", "Clustered", "Factored", "InputScaled", "FakeQuant", "LSQ", "PACT", "Scored"),
    "LowRank(Quantized, nf4)",
]


@pytest.fixture(autouse=True, scope="module")
def quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def fresh(family: str) -> LM:
    return LM.initialize(model_config(family, **SIZES, **POSITIONS.get(family, {})), jax.random.key(0))


def two_steps(lm: LM, names: tuple[str, ...] = ()) -> tuple[ShardedStep, list[TrainState]]:
    """The states before, between and after two steps with large steps, as a run takes them."""
    task = "seq2seq" if lm.config.encoder_decoder else "masked" if lm.config.head == "masked" else "causal"
    method = chain([(name, lora(rank=2)) for name in names])
    start = method.init(jax.random.key(1), lm)
    training = TrainSettings(steps=2, learning_rate=0.05, schedule="constant")
    plan = sharded_step(one_device_setup(lm, task, training), method, start, training.steps)
    create = jax.jit(plan.create, out_shardings=plan.placement)
    state = create(dropout_key(0), shard_tree(plan.params, arrays(plan.placement.params)), start.state)
    ids = np.random.default_rng(0).integers(1, 19, (4, 6)).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}
    if lm.config.encoder_decoder:
        batch |= {"decoder_input_ids": ids, "decoder_attention_mask": np.ones_like(ids)}
    placed = jax.device_put(batch, plan.placement.step)
    steps = compiled(plan.step, plan.placement, state, start.constants, [placed])
    states = [jax.tree.map(jnp.copy, state)]
    for _ in range(2):
        state, log = steps.of(placed)(state, start.constants, placed)
        assert int(log["nonfinite"]) == 0
        states.append(jax.tree.map(jnp.copy, state))
    steps.close()
    return plan, states


def check(plan: ShardedStep, states: list[TrainState], lm: LM):
    """What trains has moved and is float32, the rest is to the bit what was read, beside what methods add.

    Biases of keys have no gradient but rounding's, and bounds of inputs that none reaches have none.
    """
    before = arrays(lm.params)
    verdicts = {canonical_path(name): name in plan.trained for name in arrays(states[-1].params)}
    first, last = (arrays(canonical_view(state.params)) for state in (states[0], states[-1]))
    assert plan.trained
    for name, array in last.items():
        read = before.get(name, before.get(name.removesuffix(".base")))
        if verdicts[first_of_segment(name, verdicts)]:
            assert array.dtype == jnp.float32, name
            assert name.endswith(("key/bias", ".clip")) or not np.array_equal(array, first[name]), name
        elif read is not None and describe(lm.params)[name.removesuffix(".base")].role in ("base", "codes"):
            assert array.dtype == read.dtype and np.array_equal(array, read), name


def first_of_segment(name: str, names: dict[str, bool]) -> str:
    """The name under which a run knows the layers that are stacked with this one."""
    return name if name in names else name.replace("layers_1", "layers_0")


@pytest.mark.parametrize(("family", "dtype"), [*((name, "bfloat16") for name in FAMILIES), ("llama", "float16")])
def test_every_family_trains_from_half_precision(family, dtype, tmp_path):
    jaxlm.save(fresh(family), tmp_path / "m", dtype=dtype)
    lm = jaxlm.load(tmp_path / "m")
    assert {array.dtype for array in arrays(lm.params).values()} == {jnp.dtype(dtype)}
    check(*two_steps(lm), lm)


@pytest.mark.parametrize("name", FORMATS if FULL else FORMATS[::2])
def test_every_stored_format_trains(name, tmp_path):
    """The weight lies in one layer of a model in bfloat16."""
    weight: Weight = STORED[name]
    dense = fresh("gpt2")
    with_weight = dense.replace(params=unflatten(flatten(dense.params) | {KERNEL: weight}))
    jaxlm.save(with_weight, tmp_path / "m", dtype="bfloat16")
    lm = jaxlm.load(tmp_path / "m")
    assert type(flatten(lm.params)[KERNEL]) is type(weight)
    check(*two_steps(lm), lm)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_lora_freezes_a_base_in_its_own_format(family, tmp_path):
    """QLoRA: nf4 in the layers, bfloat16 elsewhere, all of it as it was read; the update is float32."""
    surgery = {"name": "quantize", "bits": "nf4", "group": 8, "targets": r".*(query|value|up)/kernel"}
    jaxlm.save(registry.operate(surgery, fresh(family)), tmp_path / "m", dtype="bfloat16")
    lm = jaxlm.load(tmp_path / "m")
    plan, states = two_steps(lm, ("lora",))
    frozen = {array.dtype.name for name, array in arrays(states[-1].params).items() if name not in plan.trained}
    assert frozen == {"int4", "bfloat16", "float32"}  # codes, the rest of the model, scales
    check(plan, states, lm)


def test_a_state_of_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"a/kernel trains and is bfloat16: what trains must be float32"):
        create_state(dropout_key(0), {"a": {"kernel": jnp.ones((2, 2), jnp.bfloat16)}}, {}, None, {"a/kernel"})
