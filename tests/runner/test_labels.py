"""Whose classes count: every side that may have some, in every order."""

import re

import pytest

from jaxlm.runner.labels import Classes, configured_classes

CLASSES, OTHER, NUMBERS = ("neutral", "neg", "pos"), ("joy", "fear"), ("LABEL_0", "LABEL_1", "LABEL_2")


def resolve(model=(), config=(), teachers=(), data=None, trains=True):
    """The classes, and what was said; without `data` the training data may not be read."""
    said: list[str] = []
    read = pytest.fail if data is None else lambda: data
    return Classes(model, config, teachers, read, trains, "the-model").resolve(said.append), said


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ({"model": CLASSES, "data": ("neg", "neutral", "pos")}, CLASSES),  # the data's order is alphabetical
        ({"model": CLASSES, "data": ("neg", "pos")}, CLASSES),  # a part of the classes
        ({"model": CLASSES, "trains": False}, CLASSES),  # evaluated or compressed: the data are not asked
        ({"model": CLASSES, "teachers": CLASSES}, CLASSES),
        ({"model": CLASSES, "config": CLASSES}, CLASSES),
        ({"teachers": CLASSES}, CLASSES),  # a student without a head has its teacher's order
        ({"config": OTHER, "data": ("fear", "joy")}, OTHER),
        ({"data": ("fear", "joy")}, ("fear", "joy")),
        ({"model": NUMBERS, "data": ("0", "1", "2")}, NUMBERS),
        ({"model": NUMBERS, "data": ("LABEL_1",)}, NUMBERS),
        ({"model": NUMBERS, "trains": False}, NUMBERS),
        ({"model": NUMBERS, "config": CLASSES, "trains": False}, CLASSES),  # names for outputs that have none
    ],
)
def test_the_head_stays_and_nothing_is_said(sides, expected):
    assert resolve(**sides) == (expected, [])


@pytest.mark.parametrize(
    "sides",
    [
        {"model": CLASSES, "data": ("neg", "odd", "pos")},
        {"model": CLASSES, "config": OTHER},
        {"model": CLASSES, "config": OTHER, "teachers": OTHER},
        {"model": NUMBERS, "data": ("neg", "pos")},
        {"model": NUMBERS, "config": ("neg", "pos")},
    ],
)
def test_a_fresh_head_is_said_with_both_sets(sides):
    names, said = resolve(**sides)
    assert names == (sides.get("config") or sides["data"])
    assert len(said) == 1 and ", ".join(sides["model"]) in said[0] and ", ".join(names) in said[0]


def test_outputs_without_names_are_taken_in_order_and_that_is_said():
    names, said = resolve(model=NUMBERS, data=("neg", "odd", "pos"))
    assert names == ("neg", "odd", "pos") and "config.data.labels" in said[0]


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ({"model": CLASSES, "config": CLASSES[::-1]}, "in another order: its outputs are neutral, neg, pos"),
        ({"model": CLASSES, "config": OTHER, "trains": False}, "config.data.labels has joy, fear"),
        ({"model": CLASSES, "teachers": OTHER}, "the teacher has joy, fear"),
        (
            {"model": CLASSES, "config": OTHER, "teachers": CLASSES},
            "evaluated, compressed and distilled with its own classes",
        ),
        (
            {"model": NUMBERS, "teachers": CLASSES},
            "say with config.data.labels which of neutral, neg, pos each of them is",
        ),
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
        configured_classes(labels)
