import dataclasses
import math
import re

import pytest

from jaxlm.evaluate.comparison import by_name
from jaxlm.report import summary as module
from jaxlm.report.summary import badges, described, near_enough, no_gain, recommendations, sentence, summary
from jaxlm.tasks.metrics import accuracy, bits_per_byte, pearson


def test_the_sentence_says_what_is_gained_and_where_nothing_is(rows):
    named = by_name(rows)
    text = sentence(named["int8"], named["prune"])
    assert text.startswith("Against prune it is smaller and as good at text, but slower: ")
    assert "3.81× smaller" in text and "only 0.90× as fast in batches (0." in text
    text = sentence(named["student"], named["control"])
    assert text.startswith("Against control it is better at text, but no smaller and no faster")
    assert "no difference beyond noise" in text


def test_a_model_without_any_gain_is_called_so(awkward):
    named = by_name(awkward)
    slow = next(row for row in awkward if row.name.startswith("a-very"))
    assert "larger, slower and worse at text, with no gain" in sentence(slow, named["teacher"])
    assert f"{slow.name} is dominated by teacher, which is " in summary(awkward, 0.05)


def test_what_was_not_measured_is_said(awkward):
    named = by_name(awkward)
    text = sentence(named["counted"], named["teacher"])
    assert "not timed in batches" in text and "quality not measured" in text
    assert "its predictions are not numbers" in sentence(named["broken"], named["teacher"])
    assert [finding.outcome for finding in badges(named["counted"], named)] == [1, None, None]


def test_speed_in_batches_and_at_batch_1_may_differ(rows, make):
    mixed = dataclasses.replace(rows[4], single=make.timing(1.0))
    phrases = [finding.phrase for finding in badges(mixed, by_name([*rows[:4], mixed]))]
    assert phrases[1:3] == ["faster in batches", "slower at batch 1"]


def test_recommendations_stay_within_the_tolerance_and_skip_what_is_dominated(rows):
    assert [(r.wish, r.name) for r in recommendations(rows, 0.05)] == [
        ("Best text", "teacher"),
        ("Smallest", "int8"),
        ("Fastest", "student"),
    ]
    assert [r.name for r in recommendations(rows, 0.03)] == ["teacher", "int8", "prune"]
    assert [r.name for r in recommendations(rows, 0.001)] == ["teacher"]
    assert "control" not in [r.name for r in recommendations(rows, 0.5)], "as small and fast as the student, and worse"


def test_the_summary_of_many_models_is_short(rows, monkeypatch):
    monkeypatch.setattr(module, "MANY", 3)
    text = summary(rows, 0.05)
    assert "for size ship int8" in text and "Beside" not in text
    assert text.endswith("Dominated by the model in brackets, equal or better in every way: control (student).")


def test_the_summary_names_what_to_ship_and_what_not(rows):
    text = summary(rows, 0.05)
    assert "for size ship int8 (5.91× smaller, 2." in text and "for speed ship student (1.6" in text
    assert "control is dominated by student, which is as small, as fast and better at text." in text
    assert "Beside prune, int8 is smaller and as good at text, but slower." in text
    text = summary(rows, 0.001)
    assert "nothing is smaller (the closest is " in text and "nothing is faster (the closest is " in text


def test_one_model_may_be_both(rows):
    assert "ship student, both the smallest and the fastest (1.6" in summary(rows[:3], 0.05)


def test_no_recommendation_without_the_quality_of_the_reference(rows, make):
    for reference in (dataclasses.replace(rows[0], held_out=None), make.row("teacher", 25.4, 0.4, math.nan)):
        assert summary([reference, *rows[1:]], 0.05).startswith("No model is recommended")


def test_a_single_model_is_not_compared(rows):
    assert "nothing to compare it with" in summary(rows[:1], 0.05)
    assert described(rows[0], by_name(rows[:1])) == ["Compared with no other model."]


@pytest.mark.parametrize("seconds", [0.8, 0.41])
def test_models_that_are_not_faster_are_never_the_fastest(make, seconds):
    rows = [make.row("teacher", 25, 0.41, 1.6), make.row("int8", 6, seconds, 1.6, reference="teacher")]
    assert "Fastest" not in [r.wish for r in recommendations(rows, 0.05)]
    assert "nothing is faster." in summary(rows, 0.05)


def test_more_is_better_where_it_is(classifiers):
    named = by_name(classifiers)
    text = sentence(named["control"], named["teacher"])
    assert "smaller and faster, but less accurate" in text and re.search(r"\d\.\d ± \d\.\d points less accuracy", text)
    assert "as accurate" in sentence(named["int8"], named["teacher"])
    assert "more accurate" in sentence(named["student"], named["control"])
    assert [(r.wish, r.name) for r in recommendations(classifiers, 0.03)] == [
        ("Most accurate", "int8"),  # as accurate as the teacher, smaller and faster
        ("Smallest", "int8"),
        ("Fastest", "student"),
    ]
    text = summary(classifiers, 0.03)
    assert text.startswith("Keeping at least 97% of the accuracy of teacher: for size ship int8 (3.92× smaller, 9")
    assert "Most accurate: int8 (" in text and "teacher is dominated by int8, which is as accurate" in text
    assert "control is dominated by student, which is as small, as fast and more accurate." in text


@pytest.mark.parametrize("metric", [bits_per_byte, accuracy, pearson])
def test_what_is_near_enough_lies_on_the_good_side_or_within_the_tolerance(metric):
    better, worse = (2.2, 1.8) if metric.higher else (1.8, 2.2)
    assert near_enough(better, 2.0, metric, 0.0)
    assert near_enough(worse, 2.0, metric, 0.11) and not near_enough(worse, 2.0, metric, 0.09)


def test_negative_results_are_reported(rows):
    named = by_name(rows)
    assert no_gain(named["int8"], named["teacher"]) == "No gain in quality."
    assert no_gain(named["int8"], named["prune"]) == "No gain in speed in batches, latency at batch 1 and quality."
    assert "No gain in quality." in described(named["int8"], named)


def test_of_a_reference_that_gets_nothing_right_there_is_no_share(make):
    """Smaller and faster than a reference whose quality is 0: the quality is given, not a share of nothing."""
    rows = [
        make.row("teacher", 25, 0.41, accuracy=0.0),
        make.row("student", 6, 0.2, accuracy=0.9, reference="teacher"),
    ]
    assert rows[0].quality.value == 0
    sizes = {r.wish: r.numbers for r in recommendations(rows, 0.05)}
    assert re.fullmatch(r"4\.17× smaller, \d+\.\d ± \d\.\d% accuracy", sizes["Smallest"])
    assert "student" in summary(rows, 0.05)
