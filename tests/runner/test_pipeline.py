"""A pipeline of tiny stages: done once, done again only where inputs changed, and reported."""

import json
import random
import re

import numpy as np
import pytest

import jaxlm
from jaxlm.evaluate.benchmark import Answers
from jaxlm.runner import registry
from jaxlm.runner.config import default_config, overlay
from jaxlm.runner.pipeline import fingerprint, run, stage_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sentences of a toy grammar, one a line."""
    draw = random.Random(0)
    words = ["the cat", "a dog", "one bird", "sees", "hears", "likes", "a tree", "the sea", "some rain"]
    lines = [" ".join((draw.choice(words[:3]), draw.choice(words[3:6]), draw.choice(words[6:]))) for _ in range(120)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(lines))
    return path


def tiny(corpus, steps=2):
    config = default_config()
    config.data.format, config.data.documents = "text", "line"
    config.data.train, config.data.eval = f"{corpus}[:90%]", f"{corpus}[90%:]"
    config.data.tokenizer, config.data.max_length = "character", 16
    config.model.hidden_size, config.model.num_layers, config.model.num_heads = 24, 2, 3
    config.model.max_positions = 16
    config.train.batch_size, config.mesh.data = 8, 1
    config.mesh.fsdp = -1
    config.report.corpus, config.report.prompt = "a toy grammar", "the cat"
    config.report.rounds, config.report.seconds, config.report.batch_size = 3, 0.1, 8
    learn = {"name": "distill", "teacher": "teacher", "hidden": 0.1}
    config.stages = (
        {"name": "teacher", "description": "from scratch", "train": {"steps": steps}},
        {
            "name": "prune",
            "description": "narrower",
            "after": "teacher",
            "reference": "teacher",
            "surgery": ({"name": "prune", "heads": 1 / 3, "ffn": 0.5, "score": "activation"},),
            "losses": (learn,),
            "train": {"steps": 2},
        },
        {
            "name": "quantize",
            "description": "int8",
            "after": "prune",
            "reference": "teacher",
            "surgery": ({"name": "quantize"},),
        },
    )
    return config


def times(workdir):
    return {path.parent.name: path.stat().st_mtime_ns for path in workdir.glob("*/result.json")}


def test_every_stage_once_and_again_only_where_inputs_changed(corpus, tmp_path):
    rows = run(tiny(corpus), tmp_path)
    assert [row.name for row in rows] == ["teacher", "prune", "quantize"]
    assert all((tmp_path / name).exists() for name in ("report.html", "report.md", "report.json", "pareto.png"))
    teacher, prune, quantize = rows
    assert prune.parameters < teacher.parameters
    assert quantize.parameters == prune.parameters and quantize.bytes_on_disk < prune.bytes_on_disk
    assert quantize.bytes_by_dtype["int8"] > 0.8 * prune.parameters

    assert re.fullmatch(r"2 steps in \d+ s, then 2 steps in \d+ s", quantize.facts["Training"])
    assert "Calibrated on" not in teacher.facts
    assert re.match(r"[\d,]+ rows, [\d,]+ tokens of .*corpus.txt", quantize.facts["Calibrated on"])

    small = jaxlm.load(tmp_path / "prune" / "model").config
    assert small.num_heads == (2, 2) and small.ffn_size == (48, 48) and small.head_dim == 8

    first = times(tmp_path)
    again = run(tiny(corpus), tmp_path)
    assert times(tmp_path) == first and [repr(row) for row in again] == [repr(row) for row in rows]

    changed = tiny(corpus)
    changed.stages[1]["train"]["steps"] = 3
    run(changed, tmp_path)
    second = times(tmp_path)
    assert {name for name in first if first[name] != second[name]} == {"prune", "quantize"}
    assert json.loads((tmp_path / "prune" / "result.json").read_text())["steps"] == 3
    assert json.loads((tmp_path / "prune.previous" / "result.json").read_text())["steps"] == 2

    changed.stages[2]["description"] = "eight bits"
    *_, said = run(changed, tmp_path)
    assert times(tmp_path) == second and said.description == "eight bits", "another report of the same models"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"stepz": 3}}, "stage student: config.train has no field 'stepz'; did you mean 'steps'"),
        ({"surgerie": ()}, "did you mean 'surgery'"),
        ({"after": "techer"}, "did you mean 'teacher'"),
        ({"surgery": ({"name": "prunes"},)}, "did you mean 'prune'"),
    ],
)
def test_a_misspelt_stage_is_refused_by_name(corpus, tmp_path, change, message):
    config = tiny(corpus)
    (tmp_path / "teacher" / "model").mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        student = stage_config(config, {"name": "student", **change}, {"teacher": tmp_path / "teacher"})
        for entry in student.surgery:
            registry.operate(entry, lm=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, r"config.stages\[1\] needs a name"),
        ({"description": ""}, r"config.stages\[1\] needs a description"),
        ({"name": ".."}, "has no place in the workdir"),
        ({"name": "teacher"}, "two stages are called 'teacher'"),
        ({"reference": "techer"}, "did you mean 'teacher'"),
        ({"beside": ("quantise",)}, "did you mean 'quantize'"),
    ],
)
def test_a_pipeline_that_could_not_be_reported_is_refused_before_it_runs(corpus, tmp_path, change, message):
    config = tiny(corpus)
    stages = list(config.stages)
    stages[1] = {**stages[1], **change}
    config.stages = tuple(stages)
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Every task ----------------------------------------------------------------------------------------------------------

WORDS = ("cat", "sat", "mat", "dog", "ran", "hill", "we", "saw", "red", "bird", "sing", "tree", "water", "Anna", "Rome")
FAMILY = {"causal": "gpt2", "seq2seq": "t5", "denoising": "t5"}
FORMAT = {"sequence": "jsonl", "regression": "jsonl", "seq2seq": "jsonl", "token": "conll"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Data of every task; 19 rows to evaluate on, so that the last batch is ragged."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(1)
    text = lambda: " ".join(draw.choices(WORDS, k=draw.randint(2, 9)))  # noqa: E731
    tag = lambda word: "B-PER" if word == "Anna" else "B-LOC" if word == "Rome" else "O"  # noqa: E731
    for split, rows in (("train", 40), ("eval", 19)):
        (folder / f"{split}.text").write_text("\n".join(f"{text()}. {text()}. {text()}." for _ in range(rows)))
        records = [{"text": text(), "label": draw.choice("ab"), "rating": draw.random()} for _ in range(rows)]
        records = [r | {"source": r["text"], "target": " ".join(r["text"].split()[::-1])} for r in records]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (folder / f"{split}.conll").write_text(
            "\n".join("".join(f"{word} {tag(word)}\n" for word in text().split()) for _ in range(rows))
        )
    return folder


def recipe_of(task, files):
    config, kind = default_config(), FORMAT.get(task, "text")
    config.task = task
    config.data.update(format=kind, train=str(files / f"train.{kind}"), eval=str(files / f"eval.{kind}"))
    config.data.update(max_length=32, buckets=2, documents="line" if kind == "text" else "file")
    if kind == "jsonl":
        columns = {"sequence": ("text", "label"), "regression": ("text", "rating"), "seq2seq": ("source", "target")}
        config.data.columns = {"label" if name == "rating" else name: name for name in columns[task]}
    config.data.tokenizer = "bpe:380" if FAMILY.get(task) else "wordpiece:120"
    config.model.update(family=FAMILY.get(task, "bert"), hidden_size=16, num_layers=2, num_heads=2)
    if task not in ("seq2seq", "denoising"):
        config.model.max_positions = 32
    config.train.update(batch_size=8, learning_rate=0.01)
    config.report.update(corpus="words", prompt="we saw" * (task == "seq2seq"), rounds=3, seconds=0.1, batch_size=8)
    config.stages = (
        {"name": "teacher", "description": "as drawn"},
        {
            "name": "small",
            "description": "half of the heads and FFN units, in int8",
            "after": "teacher",
            "reference": "teacher",
            "surgery": ({"name": "prune", "heads": 0.5, "ffn": 0.5}, {"name": "quantize"}),
        },
    )
    return config


@pytest.mark.full("seq2seq", "masked", "sequence", "regression")
@pytest.mark.parametrize("task", ["masked", "seq2seq", "token", "sequence", "regression"])
def test_every_task_is_compared(task, files, tmp_path):
    teacher, small = run(recipe_of(task, files), tmp_path)
    stored = json.loads((tmp_path / "teacher" / "result.json").read_text())["metrics"]["eval"]
    for metric in teacher.held_out.metrics:
        name = {"entity_f1": "f1", "word_accuracy": "accuracy"}.get(metric.name, metric.name)
        value = teacher.held_out.estimate(metric).value
        if name != "bits_per_byte":  # there the task counts every byte, the report those of predicted tokens
            assert value == pytest.approx(stored[name], rel=1e-4, abs=1e-6), name
    assert small.held_out.agreement is not None and teacher.held_out.agreement is None
    assert small.layers[0].heads == 1 and teacher.layers[0].heads == 2 and small.layers[0].bits < 20
    assert small.flops_per_token < teacher.flops_per_token and small.peak_bytes > 0
    assert small.compile_seconds > 0 and (small.sample is None) == (task != "seq2seq")
    assert "layers.png" in (tmp_path / "report.md").read_text()


def test_the_mesh_is_no_input_of_a_stage(files, tmp_path):
    one, two = (stage_config(recipe_of("sequence", files), {"name": "teacher"}, {}) for _ in range(2))
    overlay(two, {"mesh": {"fsdp": 2}, "sharding": {"embed": "tensor"}}, "config")
    assert fingerprint(one, {}, "code") == fingerprint(two, {}, "code")
    two.seed = 1
    assert fingerprint(one, {}, "code") != fingerprint(two, {}, "code")


def test_what_cannot_be_compared_is_refused_before_it_runs(files, tmp_path):
    config = recipe_of("sequence", files)
    stages = config.stages
    config.stages = ({"name": "body", "description": "pre-trained", "task": "masked"}, *stages)
    with pytest.raises(ValueError, match=r"stage body has the task 'masked', the report is about 'sequence'.*compare"):
        run(config, tmp_path)
    config.stages = ({"name": "body", "description": "pre-trained", "task": "masked", "compare": False}, *stages)
    config.report.split = "test"
    with pytest.raises(ValueError, match=r"config.data.test is empty; the report measures on it"):
        run(config, tmp_path)
    config.report.split = "dev"
    with pytest.raises(ValueError, match=r"config.report.split = 'dev': eval or test"):
        run(config, tmp_path)


def answers(rows, predicted, labels):
    return Answers(
        [{"predicted": np.array(p)} for p in predicted], list(map(np.array, labels)), list(map(np.array, rows))
    )


def test_answers_about_examples_are_put_beside_those_of_another_tokenizer():
    teacher = answers([[2, 0], [1, -1]], [[20, 0], [10, 99]], [[7, 5], [6, -100]])
    other = answers([[1, 2], [0, -1]], [[0, 0], [0, 0]], [[6, 7], [5, -100]])
    first, second = teacher.beside(other)
    assert first["predicted"].tolist() == [10, 20] and second["predicted"][0] == 0
    assert teacher.beside(teacher) is teacher.read
    tokens = answers([[0, 1]], [[[1, 2], [3, 4]]], [[[1, 2], [3, 4]]])
    assert tokens.beside(answers([[1, 0]], [[[1, 2], [3, 4]]], [[[3, 4], [1, 2]]])) is None
    packed = Answers([{"predicted": np.ones((1, 4))}], [np.ones((1, 4))], [None])
    assert packed.beside(packed) is packed.read
    assert packed.beside(packed._replace(labels=[np.zeros((1, 4))])) is None
