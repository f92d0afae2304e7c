"""Scores are scikit-learn's and scipy's; what there is no score of is NaN, without a warning."""

import math
import warnings

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from jaxlm.core import Term
from jaxlm.tasks import TASKS, BatchPredictions
from jaxlm.tasks.task import scalar

SOME = {"cross_entropy": Term(1.0, 2.0), "squared_error": Term(1.0, 2.0)}
NONE = {"cross_entropy": Term(0.0, 0.0), "squared_error": Term(0.0, 0.0)}
LABELS = ("a", "b", "c", "d")


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def score(task, true, predicted, labels=LABELS, terms=SOME, facts=None):
    predictions = {"true": np.asarray(true), "predicted": np.asarray(predicted)}
    return TASKS[task].score(terms, predictions, labels, facts or {})


def reported(task, true, predicted, labels=LABELS) -> dict[str, float]:
    """The measures of a report, of the same predictions."""
    true, predicted = np.asarray(true), np.asarray(predicted)
    seen = {"predicted": predicted, "nats": np.zeros(len(true))}
    pieces = TASKS[task].quality.pieces(BatchPredictions(seen, None, {"labels": true}, None, labels))
    measures = TASKS[task].quality.measures
    return {m.name: float(m.value(m.sums(pieces, len(labels)).sum(axis=0))) for m in measures}


@pytest.mark.parametrize(
    ("true", "predicted"),
    [([0, 0, 3, 3], [0, 0, 3, 3]), ([0, 0, 3, 3], [0, 1, 3, 3]), ([2, 2], [2, 2]), ([1], [3]), ([0, 1, 2], [0, 0, 0])],
)
def test_macro_f1_is_over_the_classes_that_occur(true, predicted):
    found, beside = score("sequence", true, predicted), reported("sequence", true, predicted)
    wanted = f1_score(true, predicted, average="macro", zero_division=0)
    assert found.metrics["f1"] == pytest.approx(wanted) and beside["f1"] == pytest.approx(wanted)
    assert found.metrics["accuracy"] == beside["accuracy"] == np.mean(np.array(true) == predicted)
    assert f"{wanted:.4f}" in next(line for line in found.report.splitlines() if "macro avg" in line)
    if len({*true, *predicted}) > 1:
        assert found.metrics["mcc"] == pytest.approx(matthews_corrcoef(true, predicted))
    assert beside["mcc"] == pytest.approx(found.metrics["mcc"])


def test_correlations_are_those_of_scipy():
    true, predicted = np.float32([0, 1, 2, 5]), np.float32([0.5, 0.25, 3, 4])
    metrics = score("regression", true, predicted).metrics
    assert metrics["pearson"] == pytest.approx(pearsonr(true, predicted)[0], rel=1e-6)
    assert metrics["spearman"] == pytest.approx(spearmanr(true, predicted)[0])
    assert reported("regression", true, predicted)["pearson"] == pytest.approx(metrics["pearson"])


@pytest.mark.parametrize(
    ("true", "predicted"), [([0.1] * 3, [1, 2, 3]), ([1, 2, 3], [0.1] * 3), ([1], [1]), ([1, 2], [np.nan, 1])]
)
def test_correlations_that_do_not_exist(true, predicted):
    true, predicted = np.float32(true), np.float32(predicted)
    metrics = score("regression", true, predicted).metrics
    assert metrics["loss"] == 0.5 and math.isnan(metrics["pearson"]) and math.isnan(metrics["spearman"])
    assert math.isnan(reported("regression", true, predicted)["pearson"])


@pytest.mark.parametrize(("task", "shape"), [("sequence", (0,)), ("regression", (0,)), ("token", (0, 0))])
def test_of_nothing_there_is_no_score(task, shape):
    empty = np.zeros(shape, np.int32)
    metrics = score(task, empty, empty, terms=NONE).metrics
    assert metrics and all(map(math.isnan, metrics.values()))


def test_of_sentences_without_names_there_is_no_f1():
    labels = ("B-X", "O")
    found = score("token", [[1, 1, -100]], [[1, 1, 0]], labels).metrics
    assert found["accuracy"] == 1 and all(math.isnan(found[name]) for name in ("f1", "precision", "recall"))
    assert math.isnan(reported("token", [[1, 1, -100]], [[1, 1, 0]], labels)["entity_f1"])
    found = score("token", [[0, 1]], [[1, 1]], labels).metrics
    assert [found[name] for name in ("f1", "precision", "recall", "accuracy")] == [0, 0, 0, 0.5]


def test_means():
    assert scalar({"loss": Term(np.float32(3.0), np.float32(2.0))}, "loss") == 1.5
    assert math.isnan(scalar({"loss": Term(np.float32(0.0), np.float32(0.0))}, "loss"))
