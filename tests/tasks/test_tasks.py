"""Every task trains from files to a result, and its metrics are what one computes from each example by itself."""

import functools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.special import log_softmax

import jaxlm
from jaxlm.parallel import make_mesh
from jaxlm.runner import run_setup, stage
from jaxlm.runner.config import default_config

pytestmark = pytest.mark.slow

WORDS = ("cat", "sat", "mat", "dog", "ran", "hill", "we", "saw", "red", "bird", "sing", "tree", "water", "Anna", "Rome")
FAMILY = {"causal": "gpt2", "seq2seq": "t5", "denoising": "t5"}


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """Training and evaluation data of every task; 11 evaluation rows, so the last batch of 4 is ragged."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(1)
    text = lambda: " ".join(draw.choices(WORDS, k=draw.randint(2, 9)))  # noqa: E731
    tag = lambda word: "B-PER" if word == "Anna" else "B-LOC" if word == "Rome" else "O"  # noqa: E731
    for split, rows in (("train", 40), ("eval", 11)):
        pages = [". ".join(text() for _ in range(3)) + "." for _ in range(rows)]
        (folder / f"{split}.txt").write_text("\n".join(pages) + "\n")
        records = [
            {"text": text(), "label": draw.choice("zab"), "rating": round(draw.random(), 3)} for _ in range(rows)
        ]
        records = [r | {"source": r["text"], "target": " ".join(r["text"].split()[::-1])} for r in records]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        sentences = ["".join(f"{word} {tag(word)}\n" for word in text().split()) for _ in range(rows)]
        (folder / f"{split}.conll").write_text("\n".join(sentences))
    return folder


def recipe(task: str, files: Path) -> ConfigDict:
    config = default_config()
    config.task = task
    kind = "jsonl" if task in ("sequence", "regression", "seq2seq") else "conll" if task == "token" else "text"
    ending = "txt" if kind == "text" else kind
    config.data.update(format=kind, train=str(files / f"train.{ending}"), eval=str(files / f"eval.{ending}"))
    config.data.update(max_length=32, buckets=1, documents="line" if kind == "text" else "file")
    if kind == "jsonl":
        columns = {"sequence": ("text", "label"), "regression": ("text", "rating"), "seq2seq": ("source", "target")}
        config.data.columns = {"label" if name == "rating" else name: name for name in columns[task]}
    config.data.tokenizer = "bpe:380" if FAMILY.get(task) else "wordpiece:120"
    config.model.update(family=FAMILY.get(task, "bert"), hidden_size=16, num_layers=1, num_heads=2)
    if task not in ("seq2seq", "denoising"):
        config.model.max_positions = 32
    config.train.update(steps=2, batch_size=4, learning_rate=0.1, log_every=1)
    return config


@pytest.fixture(scope="module")
def done(files, tmp_path_factory):
    """`done(task)`: the setup, the model and the result of its run of two steps."""
    runs: dict = {}

    def get(task: str):
        if task not in runs:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(run_setup, "make_mesh", lambda shape: make_mesh(shape, jax.devices()[:1]))
                config, workdir = recipe(task, files), tmp_path_factory.mktemp(task)
                result = stage.run(config, workdir)
                runs[task] = run_setup.prepare_run(config), jaxlm.load(workdir / "model"), result
        return runs[task]

    return get


def rows(made, seed=None, batch_size=4) -> Iterator[dict[str, np.ndarray]]:
    batches = made.task.batches(made.splits["eval"], made.lm.tokenizer, made.data, batch_size, seed)
    for number in range(batches.steps_per_epoch):
        batch = batches(number)
        for row in range(batch_size):
            yield {name: array[row] for name, array in batch.items()}


def alone(row: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The sequences of a row, each by itself."""
    if "segment_ids" not in row:
        yield row
        return
    for segment in range(1, row["segment_ids"].max() + 1):
        here = row["segment_ids"] == segment
        single = {"input_ids": np.zeros_like(here, np.int32), "labels": np.full(here.shape, -100)}
        for name, values in single.items():
            values[: here.sum()] = row[name][here]
        yield single | {"attention_mask": (np.arange(here.size) < here.sum()).astype(np.int32)}


@functools.cache
def outputs(lm):
    """`inputs of one sequence -> outputs`, compiled once."""
    return jax.jit(lambda inputs: lm.apply(lm.params, {name: value[None] for name, value in inputs.items()}))


def nats(lm, single, logits="logits", labels="labels") -> tuple[float, int, int]:
    """Negative log-likelihood of the labels of one sequence, their number, and how many are the likeliest."""
    wanted = np.atleast_1d(single[labels])
    inputs = {name: value for name, value in single.items() if value.ndim and "labels" not in name}
    scores = np.atleast_2d(np.asarray(outputs(lm)(inputs)[logits][0], np.float64))
    keep = wanted != -100
    likelihood = log_softmax(scores, -1)[keep, wanted[keep]]
    return -likelihood.sum(), int(keep.sum()), int((scores.argmax(-1) == wanted)[keep].sum())


@pytest.mark.parametrize("task", ["causal", "masked", "seq2seq", "denoising"])
def test_language_modelling(task, done):
    made, lm, result = done(task)
    sums = np.sum([nats(lm, single) for row in rows(made) for single in alone(row)], axis=0)
    loss, metrics = sums[0] / sums[1], result["metrics"]["eval"]
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert metrics["accuracy"] == pytest.approx(sums[2] / sums[1])


def test_bits_per_byte_account_for_every_token(done, files):
    made, lm, result = done("causal")
    documents = (files / "eval.txt").read_text().splitlines()
    ids = [made.lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents]
    special = [token for token in (lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id) if token is not None]
    labels = sum(len(row) + len(special) - 1 for row in ids)
    metrics = result["metrics"]["eval"]
    size = sum(len(text.encode()) for text in documents)
    assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] * labels / math.log(2) / size, rel=1e-6)


def test_next_sentence(done):
    made, lm, result = done("next_sentence")
    singles = [single for row in rows(made) if row["row"] >= 0 for single in alone(row)]
    tokens = np.sum([nats(lm, single) for single in singles], axis=0)
    pairs = np.sum([nats(lm, single, "next_sentence_logits", "next_sentence_labels") for single in singles], axis=0)
    metrics = result["metrics"]["eval"]
    assert metrics["loss"] == pytest.approx(tokens[0] / tokens[1], rel=1e-5)
    assert metrics["next_sentence_accuracy"] == pytest.approx(pairs[2] / pairs[1])
    assert pairs[1] == len(made.splits["eval"].examples)


def records(files: Path) -> list[dict]:
    return [json.loads(line) for line in (files / "eval.jsonl").read_text().splitlines()]


def scores(lm, **texts) -> np.ndarray:
    encoded = lm.tokenizer(**texts, padding="max_length", max_length=32)
    inputs = {name: np.array(encoded[name], np.int32) for name in ("input_ids", "attention_mask")}
    return np.asarray(outputs(lm)(inputs)["logits"][0])


def test_classes_of_texts(done, files):
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    _, lm, result = done("sequence")
    assert lm.config.labels == ("a", "b", "z")  # of the training data, in order
    true = [record["label"] for record in records(files)]
    logits = np.stack([scores(lm, text=record["text"]) for record in records(files)])
    predicted = [lm.config.labels[i] for i in logits.argmax(-1)]
    metrics = result["metrics"]["eval"]
    assert metrics["accuracy"] == accuracy_score(true, predicted)
    assert metrics["f1"] == pytest.approx(f1_score(true, predicted, average="macro"))
    assert metrics["mcc"] == pytest.approx(matthews_corrcoef(true, predicted))
    own = log_softmax(logits.astype(np.float64), -1)[range(len(true)), ["abz".index(label) for label in true]]
    assert metrics["loss"] == pytest.approx(-own.mean(), rel=1e-5)


def test_ratings_of_texts(done, files):
    _, lm, result = done("regression")
    true = np.array([record["rating"] for record in records(files)])
    predicted = np.array([scores(lm, text=record["text"])[0] for record in records(files)], np.float64)
    metrics = result["metrics"]["eval"]
    assert metrics["pearson"] == pytest.approx(np.corrcoef(true, predicted)[0, 1], abs=1e-4)
    rank = lambda values: np.argsort(np.argsort(values))  # noqa: E731
    assert metrics["spearman"] == pytest.approx(np.corrcoef(rank(true), rank(predicted))[0, 1], abs=1e-6)
    assert metrics["loss"] == pytest.approx(((true - predicted) ** 2).mean(), rel=1e-4)


def test_entities(done, files):
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    _, lm, result = done("token")
    assert lm.config.labels == ("B-LOC", "B-PER", "O")
    true, predicted = [], []
    for sentence in (files / "eval.conll").read_text().strip().split("\n\n"):
        words, tags = zip(*(line.split() for line in sentence.splitlines()), strict=True)
        encoded = lm.tokenizer(list(words), is_split_into_words=True)
        first = [encoded.word_ids().index(i) for i in range(len(words))]
        likeliest = scores(lm, text=list(words), is_split_into_words=True).argmax(-1)
        true.append(list(tags))
        predicted.append([lm.config.labels[i] for i in likeliest[first]])
    metrics = result["metrics"]["eval"]
    for name, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        assert metrics[name] == pytest.approx(score(true, predicted, zero_division=0)), name
    assert metrics["accuracy"] == pytest.approx(accuracy_score(true, predicted))


def test_every_example_counts_once_on_eight_devices(done, files):
    """Eleven examples in batches of eight: the last one has five rows of filler."""
    _, lm, result = done("sequence")
    config = recipe("sequence", files)
    config.train.batch_size = 8
    many = run_setup.prepare_run(config)
    assert many.mesh.size == 8
    evaluate = run_setup.split_evaluator(many, lm.network, "eval")
    score = evaluate(run_setup.on_mesh(many, lm))
    assert score.metrics == pytest.approx(result["metrics"]["eval"], rel=1e-5)
    assert "11" in score.report.splitlines()[-1].split()


def test_unknown_labels_of_an_evaluation_are_bad_rows(files, tmp_path):
    (tmp_path / "eval.jsonl").write_text('{"text": "a", "label": "q"}\n{"text": "b", "label": "z"}\n')
    config = recipe("sequence", files)
    config.data.eval = str(tmp_path / "eval.jsonl")
    with pytest.raises(ValueError, match=r"eval\.jsonl:1: label 'q' is not among the classes \(a, b, z\)"):
        run_setup.prepare_run(config)
    config.data.bad_rows = "skip"
    said: list[str] = []
    made = run_setup.prepare_run(config, info=said.append)
    assert len(made.splits["eval"].examples) == 1
    assert any("label 'q'" in line for line in said)
