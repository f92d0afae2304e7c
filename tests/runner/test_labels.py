"""Whose classes count: every side that may have some, in every order."""

import re

import pytest

from jaxlm.runner.labels import Classes, asked_classes

OWN, OTHER, NUMBERS = ("neutral", "neg", "pos"), ("joy", "fear"), ("LABEL_0", "LABEL_1", "LABEL_2")


def resolve(own=(), asked=(), taught=(), seen=None, trains=True):
    """The classes, and what was said; without `seen` the training data may not be read."""
    said: list[str] = []
    read = pytest.fail if seen is None else lambda: seen
    return Classes(own, asked, taught, read, trains, "the-model").resolve(said.append), said


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ({"own": OWN, "seen": ("neg", "neutral", "pos")}, OWN),  # the data's order is alphabetical
        ({"own": OWN, "seen": ("neg", "pos")}, OWN),  # a part of the classes
        ({"own": OWN, "trains": False}, OWN),  # evaluated or compressed: the data are not asked
        ({"own": OWN, "taught": OWN}, OWN),
        ({"own": OWN, "asked": OWN}, OWN),
        ({"taught": OWN}, OWN),  # a student without a head has its teacher's order
        ({"asked": OTHER, "seen": ("fear", "joy")}, OTHER),
        ({"seen": ("fear", "joy")}, ("fear", "joy")),
        ({"own": NUMBERS, "seen": ("0", "1", "2")}, NUMBERS),
        ({"own": NUMBERS, "seen": ("LABEL_1",)}, NUMBERS),
        ({"own": NUMBERS, "trains": False}, NUMBERS),
        ({"own": NUMBERS, "asked": OWN, "trains": False}, OWN),  # names for outputs that have none
    ],
)
def test_the_head_stays_and_nothing_is_said(sides, expected):
    assert resolve(**sides) == (expected, [])


@pytest.mark.parametrize(
    "sides",
    [
        {"own": OWN, "seen": ("neg", "odd", "pos")},
        {"own": OWN, "asked": OTHER},
        {"own": OWN, "asked": OTHER, "taught": OTHER},
        {"own": NUMBERS, "seen": ("neg", "pos")},
        {"own": NUMBERS, "asked": ("neg", "pos")},
    ],
)
def test_a_fresh_head_is_said_with_both_sets(sides):
    names, said = resolve(**sides)
    assert names == (sides.get("asked") or sides["seen"])
    assert len(said) == 1 and ", ".join(sides["own"]) in said[0] and ", ".join(names) in said[0]


def test_outputs_without_names_are_taken_in_order_and_that_is_said():
    names, said = resolve(own=NUMBERS, seen=("neg", "odd", "pos"))
    assert names == ("neg", "odd", "pos") and "config.data.labels" in said[0]


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ({"own": OWN, "asked": OWN[::-1]}, "in another order: its outputs are neutral, neg, pos"),
        ({"own": OWN, "asked": OTHER, "trains": False}, "config.data.labels has joy, fear"),
        ({"own": OWN, "taught": OTHER}, "the teacher has joy, fear"),
        ({"own": OWN, "asked": OTHER, "taught": OWN}, "evaluated, compressed and distilled with its own classes"),
        ({"own": NUMBERS, "taught": OWN}, "say with config.data.labels which of neutral, neg, pos each of them is"),
    ],
)
def test_other_classes_are_refused(sides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(**sides)


@pytest.mark.parametrize(
    ("labels", "message"),
    [("neg", "give the names one by one"), (("a", "b", "a"), "a names no class"), (("a", " "), "blank")],
)
def test_orders_that_are_none(labels, message):
    with pytest.raises(ValueError, match=message):
        asked_classes(labels)
