"""Every pair of what a config can name: together they train, resume bit for bit and bake equal, or are refused.

Pairs come from the registry, so that a new method is here as soon as it has its line in a table. `make test` takes one
pair of every two kinds, always the same (JAXLM_SAMPLE=1, 2, … takes others); `make test-full` takes all. Which are
refused is written down in refused_pairs.txt: a pair that begins or ceases to work is a change to that list.
"""

import functools
import inspect
import itertools
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import (
    Calibration,
    Gate,
    Method,
    MethodInit,
    SurgeryContext,
    arrays,
    chain,
    flatten,
    materialize,
)
from jaxlm.io.lm import LM
from jaxlm.models import model_config
from jaxlm.nn.stack import canonical_view
from jaxlm.runner import registry
from jaxlm.runner.distillation import distillation
from jaxlm.runner.sharded_step import ShardedStep, sharded_step
from jaxlm.tasks import TASKS
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import TrainState, dropout_key
from tests.contracts.one_device import one_device_setup
from tests.contracts.small_models import BATCH, OnlyTeacher, logits, noisy, quick

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 19, "hidden_size": 16, "num_heads": 4, "ffn_size": 16, "max_positions": 8, "dropout": 0.1}
TRAINING = TrainSettings(steps=2, learning_rate=0.02, schedule="constant", weight_decay=0.1, grad_accum=2)

# Strong enough that two steps show, by the name of the option: most methods need no line of their own.
TYPICAL: dict[str, Any] = {
    "alpha": 0.7,
    "begin": 0,
    "dynamic": False,
    "end": 2,
    "every": 1,
    "ffn": 0.25,
    "group": None,
    "heads": 0.5,
    "keep": (0, 2),
    "rank": 2,
    "share": 0.34,
    "sparsity": 0.5,
}
FORMATS = ({"bits": "int4"}, {"bits": "int8"})
OWN: dict[tuple[str, str], dict[str, Any]] = {
    ("losses", "distill"): {"alpha": 0.7, "hidden": 1.0, "relations": 1.0},
    ("methods", "l0"): {"size": 0.5, "end": 2, "speed": 50.0},
    ("surgery", "mixed_precision"): {"budget": 0.6, "choices": FORMATS, "dynamic": False},
    ("surgery", "mixed_precision_weights"): {"budget": 0.6, "choices": FORMATS, "dynamic": False},
    ("surgery", "share"): {"layer_map": (0, 0, 1)},
}
"""Options of an entry that cannot do with the typical ones, by table and name."""
SHARED = {"unshare"}
"""Surgery for models whose layers share parameters: where nothing before it shares them, they do from the start."""
ALONE = {"trim_vocabulary"}
"""Surgery that changes the tokenizer, and so the data: tested where there are texts."""

TABLES = {"surgery": registry.SURGERY, "methods": registry.METHODS, "losses": registry.LOSSES}
GIVEN = {"lm", "context", "configs"}
"""Arguments that no config names."""
CONTEXT = SurgeryContext(lambda lm: Calibration((BATCH,), "made up"), TASKS["causal"].loss)


class Entry(NamedTuple):
    """A line of the registry: the section of a config that it stands in, and its name."""

    section: str
    name: str

    def __str__(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def function(self) -> Any:
        return TABLES[self.section][self.name]

    @property
    def kind(self) -> str:
        """What is alike: surgery, losses, and methods by their folder."""
        return self.function.__module__.split(".")[2] if self.section == "methods" else self.section

    @property
    def arguments(self) -> dict[str, Any]:
        if (self.section, self.name) in OWN:
            return OWN[self.section, self.name]
        options = {n: p for n, p in inspect.signature(self.function).parameters.items() if n not in GIVEN}
        missing = [n for n, p in options.items() if p.default is p.empty and n not in TYPICAL]
        assert not missing, f"config.{self.section}: {self.name} needs {missing}; give typical values in TYPICAL or OWN"
        return {name: TYPICAL[name] for name in options if name in TYPICAL}


ENTRIES = [Entry(section, name) for section, table in TABLES.items() for name in table if name not in ALONE]


def pairs() -> list[tuple[Entry, Entry]]:
    """All ordered pairs; surgery comes before methods, and these before losses, as in a run."""
    order = list(TABLES)
    later = lambda a, b: order.index(a.section) <= order.index(b.section)  # noqa: E731
    return [(a, b) for a, b in itertools.product(ENTRIES, repeat=2) if later(a, b)]


def sample(every: list[tuple[Entry, Entry]], number: int) -> list[tuple[Entry, Entry]]:
    """One pair of every two kinds, another one for every number."""
    kinds: dict[frozenset, list[tuple[Entry, Entry]]] = {}
    for pair in every:
        kinds.setdefault(frozenset(entry.kind for entry in pair), []).append(pair)
    return [group[number % len(group)] for group in kinds.values()]


def chosen() -> list[tuple[Entry, Entry]]:
    if os.environ.get("JAXLM_FULL"):
        return pairs()
    return sample(pairs(), int(os.environ.get("JAXLM_SAMPLE", "0")))


@functools.cache
def student() -> LM:
    return noisy(model_config("gpt2", **SIZES, num_layers=3))


@functools.cache
def teachers() -> OnlyTeacher:
    """Deeper and wider than the student."""
    return OnlyTeacher(noisy(model_config("gpt2", **{**SIZES, "hidden_size": 24}, num_layers=4), seed=1))


def refused() -> set[tuple[str, str]]:
    """Pairs of the list: `first: second second …`."""
    lines = Path(__file__).with_name("refused_pairs.txt").read_text().splitlines()
    rows = (line.split(": ") for line in lines if not line.startswith("#"))
    return {(first, second) for first, others in rows for second in others.split()}


REFUSED = refused()


class Begun(NamedTuple):
    """A run before its first step, everything in it made anew."""

    method: Method
    start: MethodInit
    step: ShardedStep
    state: TrainState


def begin(pair: tuple[Entry, Entry]) -> Begun:
    lm, methods = student(), list[tuple[str, Method]]()
    if any(entry.name in SHARED for entry in pair) and pair[0].name != "share":
        lm = registry.operate({"name": "share", "layer_map": (0, 0, 1)}, lm)
    for entry in pair:
        described = {"name": entry.name, **entry.arguments}
        if entry.section == "surgery":
            lm = registry.operate(described, lm, CONTEXT)
        elif "configs" in inspect.signature(entry.function).parameters:
            methods.append((entry.name, distillation({**described, "teacher": "deeper"}, teachers())))
        else:
            methods.append((entry.name, registry.make(TABLES[entry.section], described, entry.section)))
    method = chain(methods)
    start = method.init(jax.random.key(2), lm)
    step = sharded_step(one_device_setup(lm, "causal", TRAINING), method, start, TRAINING.steps)
    return Begun(method, start, step, quick(step.create)(dropout_key(0), step.params, start.state))


def stored(state: TrainState) -> list[np.ndarray]:
    """What a checkpoint holds of a state."""
    return [np.array(leaf) for leaf in jax.tree.leaves(state)]


def restored(fresh: TrainState, leaves: list[np.ndarray]) -> TrainState:
    return jax.tree.unflatten(jax.tree.structure(fresh), [jnp.asarray(leaf) for leaf in leaves])


@pytest.mark.parametrize("pair", chosen(), ids=lambda pair: "-".join(map(str, pair)))
def test_pair(pair):
    listed = (str(pair[0]), str(pair[1])) in REFUSED
    try:
        run = begin(pair)
    except ValueError as refusal:  # says of what
        said = str(refusal)
        assert listed, f"refused, but not in refused_pairs.txt: {said}"
        assert re.search(r"layers_\d|layer_map|embed/|nothing trains", said) or any(
            entry.name in said for entry in pair
        ), said
        return
    assert not listed, "in refused_pairs.txt, but it begins"
    step = quick(run.step.step)
    first, log = step(run.state, run.start.constants, BATCH)
    saved = stored(first)
    whole, second_log = step(first, run.start.constants, BATCH)
    assert int(log["nonfinite"]) == int(second_log["nonfinite"]) == 0
    assert any(not np.array_equal(a, b) for a, b in zip(stored(run.state), stored(whole), strict=True))

    again = begin(pair)
    resumed, _ = quick(again.step.step)(restored(again.state, saved), again.start.constants, BATCH)
    for before, after in zip(stored(whole), stored(resumed), strict=True):
        assert before.dtype == after.dtype and np.array_equal(before, after)

    evaluated = run.method.eval_params(whole.params, whole.method)
    expected = logits(run.start.lm.network, evaluated)
    assert np.isfinite(expected).all()
    baked = run.method.bake(run.start.lm.replace(params=canonical_view(evaluated)), whole.method)
    flat, abstract = flatten(baked.params), flatten(baked.network.abstract())
    assert flat.keys() == baked.axes.keys() and abstract.keys() <= flat.keys()
    assert np.abs(logits(baked.network, baked.params) - expected).max() <= 2e-5 * max(np.abs(expected).max(), 1)
    shapes = {path: leaf.shape for path, leaf in abstract.items()}
    assert {path: jnp.shape(materialize(flat[path])) for path in shapes} == shapes
    assert not any(isinstance(leaf, Gate) for leaf in flat.values())
    twice = run.method.bake(baked, whole.method)
    values = arrays(twice.params)
    assert twice.config == baked.config
    assert all(np.array_equal(values[name], array) for name, array in arrays(baked.params).items())


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_every_line_of_the_registry_has_arguments(entry):
    options = inspect.signature(entry.function).parameters.keys()
    assert entry.arguments.keys() <= options or "configs" in options  # whose options are those of its teachers too


def test_a_sample_has_a_pair_of_every_two_kinds_and_samples_differ():
    every = pairs()
    kinds = {frozenset(entry.kind for entry in pair) for pair in every}
    assert len(kinds) > 10
    samples = [sample(every, number) for number in range(len(every))]
    assert all({frozenset(e.kind for e in pair) for pair in pairs} == kinds for pairs in samples[:3])
    assert {pair for pairs in samples for pair in pairs} == set(every)
