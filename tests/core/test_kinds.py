from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from jaxlm.core import checked


@dataclass(frozen=True)
class Point:
    x: int = 0


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, int, 3),
        (np.int8(3), int, 3),
        (3, float, 3.0),
        (np.float32(0.5), float, 0.5),
        (np.bool_(True), bool, True),
        (None, int | None, None),
        ([1, [2, 3]], tuple[int | tuple[int, ...], ...], (1, (2, 3))),
        ({"x": 2}, Point, Point(2)),
        (Point(2), Point | None, Point(2)),
        ([1], Any, [1]),
    ],
)
def test_what_fits_is_python_s_own(value, kind, expected):
    converted = checked(value, kind, "x")
    assert converted == expected and type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (True, int, "x: expected a whole number, found True"),
        (1.0, int, "x: expected a whole number, found 1.0"),
        (10**400, float, "x: expected a finite number"),
        (float("nan"), float, "x: expected a finite number, found nan"),
        (0, bool, "x: expected true or false, found 0"),
        ("ab", tuple[str, ...], "x: expected a list, each entry a text, found 'ab'"),
        ([1, None], tuple[int, ...] | None, "x: expected a list, each entry a whole number or null"),
        ({"y": 1}, Point, "x has no option 'y'"),
        (3, Point | None, "x: expected a table of Point or null, found 3"),
        ("a" * 10_000, int, r"found 'a{5,20}\.\.\.a{5,20}'$"),
    ],
)
def test_what_does_not_fit_is_named_shortly(value, kind, message):
    with pytest.raises(ValueError, match=message):
        checked(value, kind, "x")
