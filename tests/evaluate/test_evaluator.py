"""One engine: results, logs and reports say the same of a model, and only what is asked for is computed."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import MODEL_INPUTS, Context
from jaxlm.data.settings import DataSettings
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.evaluate.benchmark import Answers, RunnableModel, Trial, evaluate_held_out
from jaxlm.evaluate.evaluator import evaluator, predict, read_batch
from jaxlm.evaluate.settings import ReportSettings
from jaxlm.io.lm import LM
from jaxlm.models import model_config
from jaxlm.models.network import Network
from jaxlm.tasks import TASKS

ROWS, BATCH = 11, 4
FAMILY = {"causal": "gpt2", "seq2seq": "t5", "denoising": "t5"}
LABELS = {"sequence": ("a", "b", "c"), "token": ("B-X", "I-X", "O")}


def record(task: str, draw: random.Random) -> dict:
    words = ["".join(draw.choices("ab", k=draw.randint(1, 3))) for _ in range(draw.randint(1, 6))]
    text = " ".join(words)
    return {
        "seq2seq": {"source": text, "target": text[::-1]},
        "sequence": {"text": text, "label": draw.choice("abc")},
        "regression": {"text": text, "label": draw.random()},
        "token": {"tokens": words, "tags": draw.choices(LABELS["token"], k=len(words))},
        "next_sentence": {"text": f"{text}. {text}! {text}?"},
    }.get(task, {"text": text})


class Setting:
    """A task's data and a model of random parameters, as a run and as a report set them up."""

    def __init__(self, task: str, folder):
        draw = random.Random(0)
        path = folder / f"{task}.jsonl"
        path.write_text("".join(json.dumps(record(task, draw)) + "\n" for _ in range(ROWS)))
        self.data = DataSettings(format="jsonl", train="", eval=str(path), max_length=24, buckets=2)
        self.task, self.labels = TASKS[task], LABELS.get(task, ())
        kind = "bpe:380" if FAMILY.get(task) else "wordpiece:60"
        self.tokenizer = load_tokenizer(kind, ["ab a b. ba! aab? "], sentinels=self.task.sentinels)
        structure = {"vocab_size": len(self.tokenizer), "hidden_size": 16, "num_layers": 1, "num_heads": 2}
        structure |= {} if FAMILY.get(task) == "t5" else {"max_positions": 24}
        config = model_config(FAMILY.get(task, "bert"), **structure, **self.task.structure, labels=self.labels)
        self.model = Network(config)
        self.params = [
            jax.tree.map(lambda a: 5 * a, self.model.init(jax.random.key(seed))) for seed in (0, 1)
        ]  # louder than a fresh model, so that predictions differ
        self.trial = Trial(task, self.data, ReportSettings(batch_size=BATCH))

    def evaluator(self, to_devices=lambda batch: (0, batch)):
        prepared = self.task.prepare(self.data.source("eval"), self.tokenizer, self.labels, self.data)
        options = {"to_devices": to_devices, "ctx": Context(), "dtype": jnp.float32}
        return evaluator(self.task, self.model, prepared, self.tokenizer, self.data, batch_size=BATCH, **options)

    def runnable(self, which: int) -> RunnableModel:
        lm = LM(self.model.config, self.params[which], self.tokenizer)
        return RunnableModel(lm, self.model.run_view(self.params[which]), self.trial.batches(lm))


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """`settings(task)`, made once."""
    folder, made = tmp_path_factory.mktemp("data"), {}

    def get(task: str) -> Setting:
        if task not in made:
            made[task] = Setting(task, folder)
        return made[task]

    return get


@pytest.mark.parametrize("task", TASKS)
def test_a_report_says_what_the_result_says(task, settings):
    setting = settings(task)
    metrics = setting.evaluator()(setting.model.run_view(setting.params[0])).metrics
    results, _ = evaluate_held_out(setting.runnable(0), setting.trial, None)
    keys = {"entity_f1": "f1", "word_accuracy": "accuracy"} if task == "token" else {}
    for metric in results.metrics:
        assert results.estimate(metric).value == pytest.approx(metrics[keys.get(metric.name, metric.name)], rel=1e-6)
    assert list(metrics) == [*setting.task.evaluation.metrics, *setting.task.evaluation.facts]
    assert results.agreement is None and results.columns.keys() <= stored(setting)


def stored(setting: Setting) -> set[str]:
    """What a report may store: nothing that only a result needs."""
    spec = setting.task.evaluation
    everything = {"nats", "tokens", "bytes", "true", "predicted", "teacher", "agreed", "compared"}
    words = {"right", "words", "entities_right", "entities_predicted", "entities_true"}
    names = words | {"agreed", "compared"} if setting.task is TASKS["token"] else everything
    assert spec.reported(dict.fromkeys([*names, "pairs"], np.ones(1))).keys() <= names
    return names


@pytest.mark.parametrize("task", TASKS)
def test_a_model_agrees_with_itself_and_less_with_another(task, settings):
    setting = settings(task)
    first, answers = evaluate_held_out(setting.runnable(0), setting.trial, None)
    again, _ = evaluate_held_out(setting.runnable(0), setting.trial, answers)
    other, _ = evaluate_held_out(setting.runnable(1), setting.trial, answers)
    assert again.agreement.value == pytest.approx(1) and other.agreement.value < 1
    assert {name: again.columns[name] for name in first.columns} == first.columns
    assert other.columns[setting.task.evaluation.same] == first.columns[setting.task.evaluation.same]


@pytest.mark.parametrize("task", ["sequence", "regression", "token", "seq2seq"])
def test_examples_stand_in_the_order_of_the_file(task, settings):
    """However batches sort them by length; the last batch has a row of filler."""
    setting = settings(task)
    results, answers = evaluate_held_out(setting.runnable(0), setting.trial, None)
    assert results.num_examples == ROWS and sum(int((rows < 0).sum()) for rows in answers.rows) == 1
    examples = setting.trial.prepared(setting.runnable(0).lm).examples
    labels = examples.columns["labels"]
    expected = {
        "sequence": ("true", lambda: labels.tolist()),
        "regression": ("true", lambda: labels.tolist()),
        "token": ("words", lambda: [int((row >= 0).sum()) for row in labels]),
        "seq2seq": ("tokens", lambda: [len(row) for row in labels]),
    }
    column, values = expected[task]
    assert list(results.columns[column]) == values()


def test_short_pairs_without_a_hidden_token_count_for_the_pair_alone(settings):
    setting = settings("next_sentence")
    spec, runnable = setting.task.evaluation, setting.runnable(0)
    parts = [spec.examples(batch) for batch in predictions(setting, runnable, without=spec.agreement_only)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    pairs = len(setting.trial.prepared(runnable.lm).examples)
    assert columns["pairs"].tolist() == [1] * pairs and (columns["tokens"] == 0).any()
    assert len(spec.reported(columns)["tokens"]) == (columns["tokens"] > 0).sum() < pairs
    assert spec.reported(columns).keys() == {"nats", "tokens"}


def predictions(setting: Setting, runnable: RunnableModel, without: tuple[str, ...]) -> list:
    options = {"model": setting.model, "read": setting.task.evaluation.read, "without": without}
    options |= {"ctx": Context(), "dtype": jnp.float32}
    return list(predict(runnable.batches, lambda batch: read_batch(runnable.params, batch, **options), setting.labels))


def test_the_token_that_is_predicted_leaves_the_device_only_for_agreement(settings):
    setting = settings("causal")
    spec, runnable = setting.task.evaluation, setting.runnable(0)
    for without, names in (((), {"nats", "right", "predicted"}), (spec.agreement_only, {"nats", "right"})):
        for batch in predictions(setting, runnable, without):
            assert batch.read.keys() == names and not batch.batch.keys() & set(MODEL_INPUTS)
            assert batch.read["nats"].shape == (BATCH,)


def test_models_of_one_structure_share_a_compiled_program(settings):
    setting = settings("sequence")
    evaluate, before = setting.evaluator(), []
    for params in setting.params:
        evaluate(setting.model.run_view(params))
        before.append(read_batch._cache_size())
    setting.evaluator()(setting.model.run_view(setting.params[0]))
    assert before[0] == before[1] == read_batch._cache_size()


def test_a_table_is_made_only_when_it_is_asked_for(settings, monkeypatch):
    from jaxlm.tasks import classification

    setting, made = settings("sequence"), []
    monkeypatch.setattr(classification, "class_report", lambda *arguments: made.append(arguments) or "table")
    score = setting.evaluator()(setting.model.run_view(setting.params[0]))
    assert score.metrics and not made
    assert score.report == "table" and len(made) == 1
    setting = settings("causal")
    assert setting.evaluator()(setting.model.run_view(setting.params[0])).report == ""


def test_the_next_batch_is_read_before_the_predictions_of_one_are_used(settings):
    setting, events = settings("sequence"), []
    runnable = setting.runnable(0)
    for number, batch in enumerate(
        predict(runnable.batches, lambda batch: events.append("read") or {"nats": jnp.zeros(BATCH)}, setting.labels)
    ):
        events.append(f"used {number}")
        assert batch.read["nats"].shape == (BATCH,) and batch.teacher is None
    assert events == ["read", "read", "used 0", "read", "used 1", "used 2"]


def test_predictions_of_a_report_are_those_of_all_batches(settings):
    setting = settings("sequence")
    _, answers = evaluate_held_out(setting.runnable(0), setting.trial, None)
    assert isinstance(answers, Answers) and len(answers.read) == len(answers.labels) == len(answers.rows) == 3
    assert all(
        batch["predicted"].shape == labels.shape for batch, labels in zip(answers.read, answers.labels, strict=True)
    )
