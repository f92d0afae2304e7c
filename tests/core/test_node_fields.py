"""Every Weight and Site holds arrays of the shapes and dtypes that its fields are annotated with, stacked ones too."""

import dataclasses
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import jaxtyped

import jaxlm
from jaxlm.core import (
    Factored,
    FakeQuant,
    Gate,
    InputScaled,
    Masked,
    Node,
    Quantized,
    Scheme,
    Site,
    Switch,
    Weight,
    Wrapper,
    node_class,
    nodes,
)
from jaxlm.methods.observed import Observed
from jaxlm.methods.peft.low_rank import LowRank
from jaxlm.methods.prune.structured.hard_concrete import Constraint, HardConcrete
from jaxlm.methods.prune.structured.scores import Meter
from jaxlm.methods.prune.unstructured.scored import Scored
from jaxlm.methods.quantize.learned import LSQ, PACT
from jaxlm.methods.share.clustered import Clustered

W, MASK, A, B = jnp.ones((4, 6)), jnp.ones((4, 6), bool), jnp.ones((4, 2)), jnp.ones((2, 6))
STATIC = Scheme("int8", "tensor", symmetric=False)
NODES: list[Node] = [
    Masked(W, MASK),
    Scored(W, MASK, scores=W),
    FakeQuant.of(Masked(W, MASK)),
    LSQ.of(W, Scheme("int4", 3)),
    PACT.of(W),
    Quantized.of(W, Scheme("int4", 3, symmetric=False), activations=STATIC, input_range=(-1.0, 1.0)),
    Quantized.of(W, Scheme("fp8_e4m3"), channel=-2),
    Clustered(jnp.ones((4, 6), jnp.uint8), jnp.zeros(4, jnp.int32), jnp.ones((1, 16))),
    LowRank(Quantized.of(W), A, B),
    InputScaled(W, jnp.ones(4)),
    Factored(A, B),
    Observed(W, "up"),
    Gate(jnp.ones((2, 1, 1))),
    HardConcrete(jnp.ones(())),
    Constraint(jnp.ones(()), jnp.ones(())),
    Meter(jnp.ones((2, 1, 1)), valid=jnp.ones((3, 5))),
]
NODES += [cls.of(W) for cls in map(node_class, nodes()) if cls not in map(type, NODES) and hasattr(cls, "of")]
TRANSIENT = {Observed, Meter}
"""Classes that no model directory ever holds."""


def check_fields(node: Node) -> None:
    with jaxtyped("context"):  # dimensions of one name have one size over all fields
        for field in dataclasses.fields(node):
            if field.metadata.get("pytree_node", True):
                value = getattr(node, field.name)
                assert isinstance(value, field.type), f"{type(node).__name__}.{field.name}: {value} is no {field.type}"


@pytest.mark.parametrize("node", NODES, ids=lambda node: type(node).__name__)
def test_fields_are_what_their_annotations_say(node):
    check_fields(node)
    if not isinstance(node, Constraint):  # which belongs to a whole model
        check_fields(jax.tree.map(lambda a: jnp.stack([a, a, a]), node))


def test_every_class_is_here():
    assert {type(node) for node in NODES} == {*map(node_class, nodes())} | TRANSIENT


def test_every_class_that_jaxlm_defines_is_enrolled():
    for module in pkgutil.walk_packages(jaxlm.__path__, "jaxlm."):
        importlib.import_module(module.name)
    defined, heirs = set(), [Node]
    while heirs:
        heirs += (heir := heirs.pop()).__subclasses__()
        defined.add(heir)
    defined = {cls for cls in defined if cls.__module__.startswith("jaxlm.")}
    assert defined - {Node, Weight, Wrapper, Site, Switch} == {type(node) for node in NODES}


def test_a_field_of_another_shape_or_dtype_is_noticed():
    for wrong in (Masked(W, W), Masked(W, MASK[:2]), LowRank(W, A, B[:1]), Quantized.of(W).replace(scale=jnp.ones(6))):
        with pytest.raises(AssertionError, match=type(wrong).__name__):
            check_fields(wrong)
