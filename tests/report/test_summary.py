import dataclasses
import math
import re

import pytest

from jaxlm.evaluate.comparison import by_name
from jaxlm.report import summary as module
from jaxlm.report.summary import chips, described, near_enough, picks, sentence, verdict, won_nothing
from jaxlm.tasks.metrics import accuracy, bits_per_byte, pearson


def test_the_sentence_says_what_was_won_and_where_nothing_was(rows):
    named = by_name(rows)
    text = sentence(named["int8"], named["prune"])
    assert text.startswith("Against prune it is smaller and as good at text, but slower: ")
    assert "3.81× smaller" in text and "only 0.90× as fast in batches (0." in text
    text = sentence(named["student"], named["control"])
    assert text.startswith("Against control it is better at text, but no smaller and no faster")
    assert "no difference beyond noise" in text


def test_a_model_that_wins_nothing_is_told_so(awkward):
    named = by_name(awkward)
    slow = next(row for row in awkward if row.name.startswith("a-very"))
    assert "larger, slower and worse at text, and wins nothing" in sentence(slow, named["teacher"])
    assert f"Nothing speaks for {slow.name}: " in verdict(awkward, 0.05)


def test_what_was_not_measured_is_said(awkward):
    named = by_name(awkward)
    text = sentence(named["counted"], named["teacher"])
    assert "not timed in batches" in text and "quality not measured" in text
    assert "its predictions are not numbers" in sentence(named["broken"], named["teacher"])
    assert [finding.outcome for finding in chips(named["counted"], named)] == [1, None, None]


def test_speed_in_batches_and_at_batch_1_may_differ(rows, make):
    mixed = dataclasses.replace(rows[4], single=make.timing(1.0))
    words = [finding.words for finding in chips(mixed, by_name([*rows[:4], mixed]))]
    assert words[1:3] == ["faster in batches", "slower at batch 1"]


def test_picks_stay_within_the_tolerance_and_skip_what_is_beaten(rows):
    assert [(p.wish, p.name) for p in picks(rows, 0.05)] == [
        ("Best text", "teacher"),
        ("Smallest", "int8"),
        ("Fastest", "student"),
    ]
    assert [p.name for p in picks(rows, 0.03)] == ["teacher", "int8", "prune"]
    assert [p.name for p in picks(rows, 0.001)] == ["teacher"]
    assert "control" not in [p.name for p in picks(rows, 0.5)], "as small and fast as the student, and worse"


def test_the_verdict_of_many_models_is_short(rows, monkeypatch):
    monkeypatch.setattr(module, "MANY", 3)
    text = verdict(rows, 0.05)
    assert "for size ship int8" in text and "Beside" not in text
    assert text.endswith(
        "Nothing speaks for control (student): that in brackets is as good in every way and better in one."
    )


def test_the_verdict_names_what_to_ship_and_what_not(rows):
    text = verdict(rows, 0.05)
    assert "for size ship int8 (5.91× smaller, 2." in text and "for speed ship student (1.6" in text
    assert "Nothing speaks for control: student is as small, as fast and better at text." in text
    assert "Beside prune, int8 is smaller and as good at text, but slower." in text
    text = verdict(rows, 0.001)
    assert "nothing is smaller (the closest is " in text and "nothing is faster (the closest is " in text


def test_one_model_may_be_both(rows):
    assert "ship student, both the smallest and the fastest (1.6" in verdict(rows[:3], 0.05)


def test_no_recommendation_without_the_quality_of_the_reference(rows, make):
    for reference in (dataclasses.replace(rows[0], held_out=None), make.row("teacher", 25.4, 0.4, math.nan)):
        assert verdict([reference, *rows[1:]], 0.05).startswith("No model is recommended")


def test_a_single_model_is_not_compared(rows):
    assert "nothing to compare it with" in verdict(rows[:1], 0.05)
    assert described(rows[0], by_name(rows[:1])) == ["Compared with no other model."]


@pytest.mark.parametrize("seconds", [0.8, 0.41])
def test_models_that_are_not_faster_are_never_the_fastest(make, seconds):
    rows = [make.row("teacher", 25, 0.41, 1.6), make.row("int8", 6, seconds, 1.6, reference="teacher")]
    assert "Fastest" not in [pick.wish for pick in picks(rows, 0.05)]
    assert "nothing is faster." in verdict(rows, 0.05)


def test_more_is_better_where_it_is(classifiers):
    named = by_name(classifiers)
    text = sentence(named["control"], named["teacher"])
    assert "smaller and faster, but less accurate" in text and re.search(r"\d\.\d ± \d\.\d points less accuracy", text)
    assert "as accurate" in sentence(named["int8"], named["teacher"])
    assert "more accurate" in sentence(named["student"], named["control"])
    assert [(p.wish, p.name) for p in picks(classifiers, 0.03)] == [
        ("Most accurate", "int8"),  # as accurate as the teacher, smaller and faster
        ("Smallest", "int8"),
        ("Fastest", "student"),
    ]
    text = verdict(classifiers, 0.03)
    assert text.startswith("Keeping at least 97% of the accuracy of teacher: for size ship int8 (3.92× smaller, 9")
    assert "Most accurate: int8 (" in text and "Nothing speaks for teacher: int8 is as accurate" in text
    assert "Nothing speaks for control: student is as small, as fast and more accurate." in text


@pytest.mark.parametrize("measure", [bits_per_byte, accuracy, pearson])
def test_what_is_near_enough_lies_on_the_good_side_or_within_the_tolerance(measure):
    better, worse = (2.2, 1.8) if measure.higher else (1.8, 2.2)
    assert near_enough(better, 2.0, measure, 0.0)
    assert near_enough(worse, 2.0, measure, 0.11) and not near_enough(worse, 2.0, measure, 0.09)


def test_where_nothing_was_won_it_is_said(rows):
    named = by_name(rows)
    assert won_nothing(named["int8"], named["teacher"]) == "Nothing won in quality."
    assert won_nothing(named["int8"], named["prune"]) == (
        "Nothing won in speed in batches, latency at batch 1 and quality."
    )
    assert "Nothing won in quality." in described(named["int8"], named)
