"""Rows that are groups of texts, by a task of triples: they train, evaluate, are distilled and compressed as texts are,
and no batch, microbatch or device cuts one apart."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import Term, arrays, text_rows
from jaxlm.data.encoding import encode
from jaxlm.data.packing import counted
from jaxlm.data.ragged import Examples
from jaxlm.losses.cross_entropy import IGNORED
from jaxlm.parallel import make_mesh
from jaxlm.runner import stage
from jaxlm.runner.dry_run import dry_run, lower_step
from jaxlm.tasks import TASKS, EvalSpec, Prepared, Task
from jaxlm.tasks.classification import class_examples, padded_batches
from jaxlm.tasks.metrics import accuracy, example_loss
from jaxlm.tasks.task import PADDED, Column, only, text_of

pytestmark = [pytest.mark.usefixtures("quick_to_compile"), pytest.mark.slow]
MARGIN = 0.1
FIELDS = ("text", "positive", "negative")
TOPICS = (("cat", "dog", "bird", "fish"), ("sun", "rain", "snow", "wind"))


def triples(source, tokenizer, labels, settings):
    """An anchor, what is like it, what is not: the right one of the two candidates is number 0."""
    rows = list(source.usable(lambda record: [text_of(record, name, source) for name in FIELDS]))
    encoded = encode(tokenizer, [text for row in rows for text in row], max_length=settings.max_length)
    columns = {
        "input_ids": encoded.ids,
        "labels": np.zeros(len(rows), np.int32),
        "distill_mask": np.ones((len(rows), 3), np.int32),
    }
    return Prepared(Examples(columns, group=3), {})


def similarities(outputs):
    """Cosines of an anchor and its candidates, float32 `[rows, 2]`."""
    x = outputs["pooled"].astype(jnp.float32)
    x = (x / jnp.linalg.norm(x, axis=-1, keepdims=True)).reshape(-1, 3, x.shape[-1])
    return jnp.einsum("rd,rcd->rc", x[:, 0], x[:, 1:])


def hinge(outputs):
    """`max(0, margin - cos(a, p) + cos(a, n))` `[rows]`."""
    cosines = similarities(outputs)
    return jnp.maximum(0, MARGIN - cosines[:, 0] + cosines[:, 1])


def triple_loss(outputs, batch):
    real = (batch["labels"] != IGNORED).astype(jnp.float32)
    return {"margin": Term(jnp.sum(hinge(outputs) * real), jnp.sum(real))}


def triple_read(outputs, batch):
    return {"nats": hinge(outputs), "predicted": jnp.argmax(similarities(outputs), axis=-1)}


def in_batch_loss(outputs, batch):
    """Every other row's positive is a negative too."""
    real = batch["labels"] != IGNORED
    x = outputs["pooled"].reshape(-1, 3, outputs["pooled"].shape[-1])
    scores = jnp.where(real[None, :], x[:, 0] @ x[:, 1].T, -1e9)
    nats = -jnp.diagonal(jax.nn.log_softmax(scores))
    return {"in_batch": Term(jnp.sum(jnp.where(real, nats, 0)), jnp.sum(real.astype(jnp.float32)))}


TRIPLE = Task(
    structure={"head": "pooled"},
    prepare=triples,
    batches=padded_batches,
    loss=triple_loss,
    evaluation=EvalSpec(
        metrics={"loss": example_loss, "accuracy": accuracy},
        compared=(accuracy,),
        read=triple_read,
        examples=class_examples,
        same="true",
        reported=only("true", "predicted", "nats"),
    ),
    columns={**PADDED, "labels": Column(per_token=False)},
    group=3,
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(TASKS, "triple", TRIPLE)
    monkeypatch.setitem(TASKS, "in_batch", TRIPLE._replace(loss=in_batch_loss, couples_rows=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """`train.jsonl` (30 triples) and `eval.jsonl` (11): a batch of 8 is filled up in both."""
    folder, draw = tmp_path_factory.mktemp("triples"), random.Random(0)
    for name, rows in (("train", 30), ("eval", 11)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(rows):
                topic, other = draw.sample(TOPICS, 2)
                words = [draw.choices(kind, k=draw.randint(1, 12)) for kind in (topic, topic, other)]
                print(json.dumps(dict(zip(FIELDS, map(" ".join, words), strict=True))), file=file)
    return folder


@pytest.fixture
def recipe(recipe, data):
    def make(**train):
        config = recipe(**train)
        config.task = "triple"
        config.data.update(format="jsonl", documents="file", tokenizer="wordpiece:60", max_length=16, buckets=2)
        config.data.update(train=str(data / "train.jsonl"), eval=str(data / "eval.jsonl"))
        config.model.update(family="bert")
        return config

    return make


# Plain gradient descent at rate 1 without dropout: parameters differ after two steps by what their gradients differ.
DESCENT = {"optimizer": "sgd", "b1": 0.0, "clip": 0.0, "learning_rate": 1.0, "schedule": "constant", "steps": 2}


@pytest.fixture
def trained(recipe, devices, tmp_path):
    """`trained(name, mesh, **train)`: the result and the arrays of two steps of plain gradient descent."""

    def run(name, mesh=None, **train):
        config = recipe(**DESCENT, log_every=1, **train)
        config.model.dropout = 0.0
        if mesh:
            config.mesh.update(mesh)
            devices(8)
        result = stage.run(config, tmp_path / name)
        return result, arrays(jaxlm.load(tmp_path / name / "model").params)

    return run


def test_accumulation_in_any_number_of_parts_gives_one_gradient(trained):
    result, whole = trained("whole")
    assert 0 <= result["metrics"]["eval"]["accuracy"] <= 1 and result["metrics"]["eval"]["loss"] > 0
    for parts in (2, 4):
        again, arrays_of_parts = trained(f"parts {parts}", grad_accum=parts)
        assert again["metrics"]["eval"] == pytest.approx(result["metrics"]["eval"], abs=1e-5)
        for name, array in whole.items():
            np.testing.assert_allclose(arrays_of_parts[name], array, rtol=0, atol=1e-5, err_msg=name)


def test_eight_devices_give_what_one_gives(trained):
    result, one = trained("one", grad_accum=2)
    spread, many = trained("many", {"data": 2, "fsdp": 2, "tensor": 2}, grad_accum=2)
    assert spread["metrics"]["eval"] == pytest.approx(result["metrics"]["eval"], abs=1e-5)
    for name, array in one.items():
        np.testing.assert_allclose(many[name], array, rtol=0, atol=1e-5, err_msg=name)


def test_resume_is_bit_for_bit(recipe, tmp_path, cut_at):
    whole = stage.run(recipe(steps=7), tmp_path / "whole")
    cut_at(6)
    with pytest.raises(ConnectionAbortedError):
        stage.run(recipe(steps=7), tmp_path / "cut")
    cut_at(None)
    again = stage.run(recipe(steps=7), tmp_path / "cut")
    assert again["params_sha256"] == whole["params_sha256"] and again["metrics"]["eval"] == whole["metrics"]["eval"]


@pytest.mark.full
def test_it_learns_and_a_teacher_is_distilled(recipe, tmp_path):
    config = recipe(steps=16, checkpoint_every=16, learning_rate=3e-3)
    config.model.dropout = 0.0
    result = stage.run(config, tmp_path / "teacher")
    assert result["metrics"]["eval"]["accuracy"] >= 0.9
    learns = {"name": "distill", "teacher": str(tmp_path / "teacher/model"), "alpha": 0.0, "hidden": 1.0}
    config = recipe(steps=4)
    config.losses = (learns,)
    distilled = stage.run(config, tmp_path / "student")
    lines = [json.loads(line) for line in (tmp_path / "student/metrics.jsonl").read_text().splitlines()]
    assert any(any(key.startswith("hidden_") for key in line) for line in lines) and distilled["steps"] == 4
    config.losses = ({**learns, "alpha": 0.5, "hidden": 0.0, "cache": {"directory": str(tmp_path / "cache")}},)
    with pytest.raises(ValueError, match="cache: answers are kept by text, and a row of the task 'triple' has 3 of th"):
        stage.run(config, tmp_path / "cached")


@pytest.mark.parametrize(
    "surgery", [{"name": "wanda", "sparsity": 0.5}, {"name": "prune", "ffn": 0.5, "score": "taylor"}]
)
def test_calibration_keeps_groups_together(recipe, tmp_path, surgery):
    config = recipe(steps=0)
    config.surgery, config.calibration.samples = (surgery,), 5
    result = stage.run(config, tmp_path)
    assert result["data"]["calibration"]["samples"] == 5


def test_a_dry_run_has_the_axis_of_groups(recipe):
    config = recipe()
    config.model.vocab_size = 60
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shapes = {name: struct.shape for name, struct in dry_run(config, mesh).batch.items()}
    assert shapes == {"input_ids": (8, 3, 16), "attention_mask": (8, 3, 16), "labels": (8,)}
    assert lower_step(config, mesh).as_text()


def test_a_loss_that_couples_rows_refuses_accumulation(recipe, tmp_path):
    config = recipe(steps=2)
    config.task = "in_batch"
    assert stage.run(config, tmp_path / "whole")["steps"] == 2
    config.train.grad_accum = 2
    with pytest.raises(ValueError, match=r"the task .in_batch.: .*config.train.grad_accum = 2"):
        stage.run(config, tmp_path / "parts")


def test_groups_of_another_size_are_no_examples_of_the_task(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "pair", TRIPLE._replace(group=2))
    config = recipe()
    config.task = "pair"
    with pytest.raises(ValueError, match="the task 'pair' has groups of 2, its examples of 3"):
        stage.run(config, tmp_path)


@pytest.mark.full("bert")
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_outputs_of_a_group_are_those_of_its_texts(family):
    fields = {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    lm = jaxlm.LM.initialize(jaxlm.models.model_config(family, **fields), jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {
        "input_ids": rng.integers(1, 61, (4, 3, 7)).astype(np.int32),
        "attention_mask": (np.arange(7) < rng.integers(1, 8, (4, 3, 1))).astype(np.int32),
    }
    if family == "t5":
        batch["decoder_input_ids"] = rng.integers(1, 61, (4, 3, 5)).astype(np.int32)
    grouped, flat = lm.apply(lm.params, batch), lm.apply(lm.params, text_rows(batch))
    assert grouped["logits"].shape[0] == 12
    for text in range(3):
        single = lm.apply(lm.params, {name: array[:, text] for name, array in batch.items()})
        np.testing.assert_allclose(grouped["logits"][text::3], single["logits"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(grouped["last_hidden"], flat["last_hidden"])


def test_filler_is_counted_as_nothing():
    assert counted(np.array([0, IGNORED])).tolist() == [True, False]
    fields = {"pooled": jnp.ones((6, 4)).at[3:].set(7.0)}
    terms = triple_loss(fields, {"labels": jnp.array([0, IGNORED])})
    assert float(terms["margin"].weight) == 1 and float(terms["margin"].sum) == pytest.approx(MARGIN)
