import itertools

import numpy as np
import pytest
from PIL import Image

from jaxlm.report import pareto_plot
from jaxlm.report.pareto_plot import COLORS, draw, front, knee

pytestmark = pytest.mark.slow


def test_the_front_is_what_no_point_beats():
    rng = np.random.default_rng(0)
    points = [tuple(p) for p in rng.integers(0, 12, (60, 2)).astype(float)]
    on = front(points)
    for i, j in itertools.product(range(60), range(60)):
        beats = points[j] != points[i] and points[j][0] <= points[i][0] and points[j][1] <= points[i][1]
        assert not (i in on and beats)
    for i in set(range(60)) - set(on):
        assert any(p != points[i] and p[0] <= points[i][0] and p[1] <= points[i][1] for p in points)
    assert [points[i][0] for i in on] == sorted(points[i][0] for i in on)


def colors_in(path):
    return {color for _, color in Image.open(path).convert("RGB").getcolors(1 << 24)}


def near(path, color):
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return min(np.abs(np.array(found) - wanted).max() for found in colors_in(path)) <= 6


@pytest.mark.parametrize("dark", [False, True])
def test_every_model_is_drawn_in_its_colour(rows, tmp_path, dark):
    draw(rows, tmp_path / "p.png", dark=dark, stacked=dark)
    assert all(near(tmp_path / "p.png", color) for color in COLORS[: len(rows)])
    assert not near(tmp_path / "p.png", COLORS[len(rows)])
    width, height = Image.open(tmp_path / "p.png").size
    assert (height > width) == dark
    corner = Image.open(tmp_path / "p.png").convert("RGB").getpixel((0, 0))
    assert (max(corner) < 60) == dark


def test_models_without_quality_or_speed_do_not_spoil_the_picture(awkward, make, tmp_path):
    draw(awkward, tmp_path / "awkward.png")
    draw([make.row("counted", 2.3)], tmp_path / "none.png")
    draw([make.row("untimed", 2.3, None, 1.7)], tmp_path / "untimed.png")
    assert near(tmp_path / "untimed.png", COLORS[0]) and not near(tmp_path / "none.png", COLORS[0])


def test_of_many_models_the_front_and_the_reference_are_named(make, tmp_path, monkeypatch):
    many = [make.row(f"m{i}", 5 + i, 0.3, 1.6 + 0.01 * i) for i in range(20)]
    named = []
    monkeypatch.setattr(
        pareto_plot, "_label", lambda axes, points, chosen, theme: named.append([points[i].name for i in chosen])
    )
    draw(many[:5], tmp_path / "few.png")
    assert [len(names) for names in named] == [5, 5]
    references = {row.name for row in many if row.reference is None}
    draw([*many, make.row("slow and bad", 90, 3.0, 9.0, reference="m0")], tmp_path / "many.png")
    assert {"m0", *references} <= set(named[2]) and "slow and bad" not in {*named[2], *named[3]}


def test_equal_models_are_drawn(make, tmp_path):
    draw([make.row(name, 5, 0.3, 1.6) for name in ("a", "b")], tmp_path / "equal.png")


def test_the_knee_is_where_more_cost_begins_to_buy_little():
    assert knee([(1.0, 9.0), (2.0, 4.0), (5.0, 3.0), (9.0, 2.5)]) == 1
    assert knee([(x, 1 / x) for x in (0.1, 0.3, 1.0, 3.0, 10.0)]) == 2
    assert knee([(1.0, 2.0), (2.0, 1.0)]) is None
    assert knee([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]) is None, "a straight front has none"
    assert knee([(1.0, 3.0), (1.5, 2.9), (3.0, 1.0)]) is None, "one that bends outwards neither"


def test_classifiers_are_drawn_with_the_good_side_up(classifiers, tmp_path):
    draw(classifiers, tmp_path / "p.png")
    assert all(near(tmp_path / "p.png", color) for color in COLORS[: len(classifiers)])
