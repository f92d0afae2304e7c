import math

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import f1_score, matthews_corrcoef

from jaxlm.evaluate.per_example import PerExampleResults, difference, left_out
from jaxlm.tasks import TASKS
from jaxlm.tasks.metrics import accuracy, correlation, entity_f1, loss, macro_f1, matthews, pearson, perplexity


def text(nats, tokens, sizes):
    return PerExampleResults("causal", {"nats": nats, "tokens": tokens, "bytes": sizes})


def test_bits_per_byte_and_perplexity_divide_sums_once():
    results = text((10.0, 90.0), (10, 20), (20, 80))
    assert results.quality.value == pytest.approx(100 / math.log(2) / 100)
    assert results.estimate(perplexity).value == pytest.approx(math.exp(100 / 30))
    assert results.agreement is None


def test_perplexity_never_overflows_and_one_example_has_no_interval():
    assert text((1e6,), (1,), (1,)).estimate(perplexity).value == math.inf
    assert math.isnan(text((math.nan,), (1,), (1,)).estimate(perplexity).value)
    assert text((10.0,), (10,), (20,)).quality == pytest.approx((10 / math.log(2) / 20, None))


def bootstrap(held_out, metric, draws=3000):
    sums = held_out.sums(metric)
    weights = np.random.default_rng(1).multinomial(len(sums), [1 / len(sums)] * len(sums), draws)
    return 2 * metric.value(weights @ sums).std()


def tagged(rng, sentences=400):
    true = rng.integers(0, 3, sentences)
    predicted = rng.integers(0, 3, sentences)
    right = np.minimum(true, predicted) * (rng.random(sentences) < 0.8)
    columns = {"entities_right": right, "entities_predicted": predicted, "entities_true": true}
    columns |= {"right": right + 3, "words": right + 5}
    return PerExampleResults("token", {name: tuple(map(int, c)) for name, c in columns.items()})


def rated(rng, examples=300):
    true = rng.normal(size=examples)
    predicted = true + rng.normal(size=examples)
    columns = {"true": true, "predicted": predicted, "teacher": predicted + 0.1 * rng.normal(size=examples)}
    return PerExampleResults("regression", {name: tuple(c) for name, c in columns.items()})


@pytest.mark.parametrize("metric", [accuracy, macro_f1, matthews, entity_f1, pearson, perplexity], ids=lambda m: m.name)
def test_the_error_is_that_of_resampling_examples(make, metric):
    of = {"entity_f1": tagged, "pearson": rated}.get(metric.name)
    held_out = of(np.random.default_rng(2)) if of else make.answers(0.9)
    if metric is perplexity:
        held_out = make.held_out(1.6)
    assert held_out.estimate(metric).error == pytest.approx(bootstrap(held_out, metric), rel=0.1)


def test_of_a_mean_it_is_the_textbook_error(make):
    held_out = make.answers(0.9)
    p, n = held_out.quality.value, held_out.num_examples
    assert held_out.quality.error == pytest.approx(2 * math.sqrt(p * (1 - p) / (n - 1)))


def test_metrics_of_classes_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 4, 90), rng.integers(0, 5, 90)
    columns = {"true": tuple(map(int, true)), "predicted": tuple(map(int, predicted))}
    held_out = PerExampleResults("sequence", columns, classes=6)
    values = {metric.name: held_out.estimate(metric).value for metric in held_out.metrics}
    assert values == pytest.approx(
        {
            "accuracy": np.mean(true == predicted),
            "f1": f1_score(true, predicted, average="macro", zero_division=0),
            "mcc": matthews_corrcoef(true, predicted),
        }
    )


def test_correlations_are_those_of_scipy():
    held_out = rated(np.random.default_rng(3))
    columns = held_out.columns
    assert held_out.quality.value == pytest.approx(pearsonr(columns["true"], columns["predicted"])[0])
    assert held_out.agreement.value == pytest.approx(pearsonr(columns["teacher"], columns["predicted"])[0])
    same = PerExampleResults("regression", {"true": (1.0, 2.0, 3.0), "predicted": (5.0, 5.0, 5.0)})
    assert math.isnan(same.quality.value) and TASKS["regression"].evaluation.agreement is correlation


def test_leaving_out_is_the_metric_of_the_rest(make):
    held_out = make.answers(0.8)
    rest = {name: column[1:] for name, column in held_out.columns.items()}
    without = left_out(matthews, held_out.sums(matthews))[0]
    assert without == pytest.approx(PerExampleResults("sequence", rest, classes=2).estimate(matthews).value)


def test_a_paired_difference_is_that_of_the_same_examples(make):
    a, b = make.answers(0.90, seed=1), make.answers(0.88, seed=2)
    change = difference(a, b)
    right = [(np.array(r.columns["predicted"]) == np.array(r.columns["true"])).astype(float) for r in (a, b)]
    differences = right[0] - right[1]
    assert change.value == pytest.approx(differences.mean())
    assert change.error == pytest.approx(2 * differences.std(ddof=1) / math.sqrt(len(differences)))
    assert change.error < math.hypot(a.quality.error, b.quality.error)


def test_two_tokenizers_of_one_text_are_compared_without_pairs(make):
    a = make.held_out(1.6)
    halves = {name: tuple(np.repeat(np.array(column) / 2, 2)) for name, column in a.columns.items()}
    b = PerExampleResults("causal", halves)
    change = difference(a, b)
    assert change.value == pytest.approx(0) and change.error == pytest.approx(
        math.hypot(a.quality.error, b.quality.error)
    )


def test_what_is_not_a_number_loses(make):
    good, broken = make.held_out(1.6), make.held_out(math.nan)
    assert difference(good, broken).value == -math.inf and math.isnan(difference(broken, good).value)


def test_what_does_not_fit_is_refused(make):
    with pytest.raises(ValueError, match="same examples"):
        text((1.0, 2.0), (1,), (1,))
    with pytest.raises(ValueError, match="at least one"):
        PerExampleResults("sequence", {})
    with pytest.raises(ValueError, match="without tokens"):
        text((1.0,), (0,), (0,))
    with pytest.raises(ValueError, match="did you mean 'causal'"):
        PerExampleResults("casual", {"nats": (1.0,)})
    a = make.answers(0.9)
    other = PerExampleResults("sequence", {**a.columns, "true": tuple(1 - t for t in a.columns["true"])}, classes=2)
    with pytest.raises(
        ValueError, match="different held-out data: the examples of sequence and sequence differ in true"
    ):
        difference(a, other)
    with pytest.raises(ValueError, match="different held-out data"):
        difference(a, make.held_out(1.6))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_says_how_it_is_evaluated(task):
    spec = TASKS[task].evaluation
    assert spec.compared and spec.same and {"input_ids", "labels"} <= TASKS[task].columns.keys()
    assert spec.compared[0] is not loss or not spec.compared[0].higher
    assert next(iter(spec.metrics)) == "loss" and not spec.metrics["loss"].higher
