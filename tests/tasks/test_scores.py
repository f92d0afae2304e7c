"""Metrics are scikit-learn's, seqeval's and scipy's; what there is no metric of is NaN, without a warning."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from jaxlm.evaluate.evaluator import example_columns, result_metrics
from jaxlm.tasks import TASKS, BatchPredictions
from jaxlm.tasks.metrics import Metric, perplexity

LABELS = ("a", "b", "c", "d")


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def predictions_of(true, predicted, labels=LABELS) -> list[BatchPredictions]:
    """Two batches of one split."""
    true, predicted = np.asarray(true), np.asarray(predicted)
    half = len(true) // 2
    return [
        BatchPredictions(
            read={"predicted": predicted[part], "nats": np.ones(len(true[part]), np.float32)},
            teacher=None,
            batch={"labels": true[part]},
            labels=labels,
        )
        for part in (slice(0, half), slice(half, None))
    ]


def score(task, true, predicted, labels=LABELS, facts=None) -> dict[str, float]:
    """The metrics of a result."""
    spec = TASKS[task].evaluation
    columns = example_columns(spec, predictions_of(true, predicted, labels))
    return result_metrics(spec, columns, len(labels), facts or {})


def table(task, true, predicted, labels=LABELS) -> str:
    return TASKS[task].evaluation.table(predictions_of(true, predicted, labels), {})


def reported(task, true, predicted, labels=LABELS) -> dict[str, float]:
    """The metrics of a report, of what it stores of the same predictions."""
    spec = TASKS[task].evaluation
    columns = spec.reported(example_columns(spec, predictions_of(true, predicted, labels)))
    return {metric.name: metric.over(columns, len(labels)) for metric in spec.compared}


@pytest.mark.parametrize(
    ("true", "predicted"),
    [([0, 0, 3, 3], [0, 0, 3, 3]), ([0, 0, 3, 3], [0, 1, 3, 3]), ([2, 2], [2, 2]), ([1], [3]), ([0, 1, 2], [0, 0, 0])],
)
def test_macro_f1_is_over_the_classes_that_occur(true, predicted):
    metrics, beside = score("sequence", true, predicted), reported("sequence", true, predicted)
    f1 = f1_score(true, predicted, average="macro", zero_division=0)
    assert metrics["f1"] == pytest.approx(f1) and beside["f1"] == metrics["f1"]
    assert metrics["accuracy"] == beside["accuracy"] == np.mean(np.array(true) == predicted)
    assert f"{f1:.4f}" in next(line for line in table("sequence", true, predicted).splitlines() if "macro avg" in line)
    if len({*true, *predicted}) > 1:
        assert metrics["mcc"] == pytest.approx(matthews_corrcoef(true, predicted))
    assert beside["mcc"] == metrics["mcc"] and metrics["loss"] == 1


PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(pairs=PAIRS)
def test_metrics_of_classes_are_those_of_scikit_learn(pairs):
    true, predicted = map(list, zip(*pairs, strict=True))
    metrics = score("sequence", true, predicted)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label was found")
        expected = {
            "loss": 1.0,
            "accuracy": accuracy_score(true, predicted),
            "f1": f1_score(true, predicted, average="macro", zero_division=0),
            "mcc": matthews_corrcoef(true, predicted),
        }
    assert metrics == pytest.approx(expected) and list(metrics) == list(expected)


def test_correlations_are_those_of_scipy():
    true, predicted = np.float32([0, 1, 2, 5]), np.float32([0.5, 0.25, 3, 4])
    metrics = score("regression", true, predicted)
    assert metrics["pearson"] == pytest.approx(pearsonr(true, predicted)[0], rel=1e-6)
    assert metrics["spearman"] == pytest.approx(spearmanr(true, predicted)[0])
    assert metrics["loss"] == pytest.approx(np.mean((true - predicted) ** 2))
    assert reported("regression", true, predicted)["pearson"] == metrics["pearson"]


@settings(max_examples=60, deadline=None)
@given(ratings=st.lists(st.tuples(st.integers(0, 5), st.integers(-20, 20)), min_size=2, max_size=30))
def test_correlations_of_ties_are_those_of_scipy(ratings):
    true, predicted = (np.float32(values) / 4 for values in zip(*ratings, strict=True))
    metrics = score("regression", true, predicted)
    assert metrics["loss"] == pytest.approx(np.mean(np.square(true.astype(np.float64) - predicted)))
    if np.ptp(true) and np.ptp(predicted):
        assert metrics["pearson"] == pytest.approx(pearsonr(true, predicted)[0], abs=1e-6)
        assert metrics["spearman"] == pytest.approx(spearmanr(true, predicted)[0], abs=1e-9)
    else:
        assert math.isnan(metrics["pearson"]) and math.isnan(metrics["spearman"])


@pytest.mark.parametrize(
    ("true", "predicted"),
    [([0.1] * 3, [1, 2, 3]), ([1, 2, 3], [0.1] * 3), ([1], [1]), ([1, 2], [np.nan, 1]), ([1, 2], [np.inf, 1])],
)
def test_correlations_that_do_not_exist(true, predicted):
    true, predicted = np.float32(true), np.float32(predicted)
    metrics = score("regression", true, predicted)
    assert metrics["loss"] == pytest.approx(np.mean(np.square(true.astype(np.float64) - predicted)), nan_ok=True)
    assert math.isnan(metrics["pearson"]) and math.isnan(metrics["spearman"])
    assert math.isnan(reported("regression", true, predicted)["pearson"])


@pytest.mark.parametrize(("task", "shape"), [("sequence", (0,)), ("regression", (0,)), ("token", (0, 0))])
def test_of_nothing_there_is_no_score(task, shape):
    empty = np.zeros(shape, np.int32)
    metrics = score(task, empty, empty)
    assert metrics.keys() == TASKS[task].evaluation.metrics.keys() and all(map(math.isnan, metrics.values()))
    assert task == "regression" or table(task, empty, empty) == ""


def test_of_sentences_without_names_there_is_no_f1():
    labels = ("B-X", "O")
    metrics = score("token", [[1, 1, -100]], [[1, 1, 0]], labels)
    assert metrics["accuracy"] == 1 and all(math.isnan(metrics[name]) for name in ("f1", "precision", "recall"))
    assert "entities" not in table("token", [[1, 1, -100]], [[1, 1, 0]], labels)
    assert math.isnan(reported("token", [[1, 1, -100]], [[1, 1, 0]], labels)["entity_f1"])
    metrics = score("token", [[0, 1]], [[1, 1]], labels)
    assert [metrics[name] for name in ("f1", "precision", "recall", "accuracy")] == [0, 0, 0, 0.5]


TAGS = st.lists(st.tuples(st.integers(-1, 4), st.integers(0, 4)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(sentences=st.lists(TAGS, min_size=1, max_size=6))
def test_metrics_of_names_are_those_of_seqeval(sentences):
    """Of the words that have a tag: a filler row, or a later piece of a word, has none."""
    from seqeval.metrics import f1_score, precision_score, recall_score

    labels, width = ("B-X", "I-X", "B-Y", "I-Y", "O"), max(map(len, sentences))
    true, predicted = np.full((len(sentences), width), -100), np.zeros((len(sentences), width), np.int32)
    for row, sentence in enumerate(sentences):
        for column, (tag, guess) in enumerate(sentence):
            true[row, column], predicted[row, column] = (tag if tag >= 0 else -100), guess
    metrics, labelled = score("token", true, predicted, labels), true != -100
    if not labelled.any():
        assert all(map(math.isnan, metrics.values()))
        return
    named = [
        [[labels[tag] for tag in tags[words]] for tags, words in zip(rows, labelled, strict=True)]
        for rows in (true, predicted)
    ]
    expected = {
        "f1": f1_score(*named, zero_division=0),
        "precision": precision_score(*named, zero_division=0),
        "recall": recall_score(*named, zero_division=0),
    }
    if all(tag == "O" for rows in named for tags in rows for tag in tags):
        expected = dict.fromkeys(expected, math.nan)
    expected["accuracy"] = accuracy_score(true[labelled], predicted[labelled])
    expected["loss"] = labelled.any(axis=1).sum() / labelled.sum()
    assert metrics == pytest.approx(expected, nan_ok=True)


def test_perplexity_is_infinite_rather_than_an_overflow():
    def of(nats: float) -> float:
        return perplexity.over({"nats": np.array([nats]), "tokens": np.array([1])}, 0)

    assert of(60.0) == pytest.approx(math.exp(60)) and of(1e4) == math.inf and math.isnan(of(math.nan))


def test_fractions_of_sums():
    fraction: Metric = TASKS["masked"].evaluation.metrics["loss"]
    assert fraction.over({"nats": np.float32([1.0, 2.0]), "tokens": np.array([1, 1])}, 0) == 1.5
    assert math.isnan(fraction.over({"nats": np.float32([0.0]), "tokens": np.array([0])}, 0))
