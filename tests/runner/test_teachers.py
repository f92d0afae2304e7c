"""Distillation runs: live and cached teachers, several, quantized, of other families; and the student's own texts."""

import json

import numpy as np
import pytest

import jaxlm
from jaxlm.core import arrays
from jaxlm.runner import stage
from jaxlm.runner.distillation import distillation, split_options
from jaxlm.runner.teachers import cache_teachers

pytestmark = [pytest.mark.usefixtures("quick_to_compile"), pytest.mark.slow]
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture
def teacher(folder, recipe):
    """A model directory of three layers, as wide as the students'; trained once."""
    config = recipe(steps=3, checkpoint_every=0)
    config.model.num_layers, config.model.dropout = 3, 0.0
    stage.run(config, folder / "teacher")
    return str(folder / "teacher" / "model")


@pytest.fixture
def student(recipe, teacher):
    """`student(distill options, model=..., **train)`: the config of a student."""

    def make(options, model=None, **train):
        config = recipe(**{"steps": STEPS, "checkpoint_every": 2, **train})
        config.losses = ({"name": "distill", "teacher": teacher, **options},)
        if "teachers" in options:
            config.losses[0].pop("teacher")
        config.model.update(model or {})
        return config

    return make


def parameters(workdir):
    return {name: np.asarray(a) for name, a in arrays(jaxlm.load(workdir / "model").params).items()}


def close(a, b, tolerance):
    a, b = parameters(a), parameters(b)
    assert a.keys() == b.keys()
    return all(np.abs(a[name] - b[name]).max() <= tolerance for name in a)


def test_a_cached_teacher_is_the_live_one_and_resumes_bit_for_bit(student, teacher, tmp_path, cut_at, capsys):
    """k = vocabulary: the same model but for float rounding; cut off and resumed: the same bits, nobody asked again."""
    live = stage.run(student({"alpha": 0.8}), tmp_path / "live")
    cache = {"directory": str(tmp_path / "cache"), "top_k": 1000, "dtype": "float32"}
    cached = stage.run(student({"alpha": 0.8, "cache": cache}), tmp_path / "cached")
    assert close(tmp_path / "live", tmp_path / "cached", 1e-5)
    assert "teacher_caches" not in live
    (about,) = cached["teacher_caches"]
    assert about["directory"] == cache["directory"] and about["bytes_per_token"] > 4 and about["tokens"] > 1000
    assert json.loads((tmp_path / "cached/result.json").read_text())["teacher_caches"] == [about]

    capsys.readouterr()
    without = student({"alpha": 0.8, "cache": cache})
    without.losses[0].pop("teacher")  # the cache knows whose it is
    cut_at(4)
    with pytest.raises(ConnectionAbortedError):
        stage.run(without, tmp_path / "again")
    cut_at(None)
    again = stage.run(without, tmp_path / "again")
    said = capsys.readouterr().err
    assert "resumed from step 2" in said and "asking the teacher" not in said
    assert again["params_sha256"] == cached["params_sha256"]


def test_few_answers_teach_too_and_another_teacher_is_refused(student, teacher, tmp_path):
    cache = {"directory": str(tmp_path / "cache"), "top_k": 4}
    options = {"alpha": 0.8, "cache": cache, "divergence": "jsd", "beta": 0.3}
    written = cache_teachers(student(options))
    first = stage.run(student(options), tmp_path / "few")
    (about,) = first["teacher_caches"]
    assert (
        written == [about]
        and about["bytes"] > 0
        and json.loads((tmp_path / "cache/cache.json").read_text())["layout"]["top_k"] == 4
    )
    for change, message in (
        ({"temperature": 3.0}, "at the temperatures 1.0, 2.0, not 3.0"),
        ({"cache": cache | {"top_k": 8}}, "holds 4 answers a position in float16, the config asks for 8"),
        ({"teacher": str(tmp_path / "few" / "model")}, "those of another teacher"),
        ({"hidden": 1.0}, "a cache holds a teacher's answers only"),
    ):
        with pytest.raises(ValueError, match=message):
            stage.run(student(options | change), tmp_path / "refused")
    other = student(options)
    other.data.max_length = 16
    with pytest.raises(ValueError, match="those of another packing"):
        stage.run(other, tmp_path / "refused")
    other = student(options)
    other.seed = 1
    with pytest.raises(ValueError, match="do not cover this row; they were written for steps 6, seed 0, batch_size 8"):
        stage.run(other, tmp_path / "refused")
    assert not (tmp_path / "refused" / "config.json").exists()


@pytest.mark.full
def test_the_second_of_two_teachers_may_weigh_nothing(student, teacher, tmp_path):
    """Weights (1, 0) are the first alone; the second is quantized to int8 all the same, and deeper."""
    config = student({})
    config.losses, config.model.init = (), teacher
    config.model.update(
        family=None, hidden_size=None, num_layers=None, num_heads=None, max_positions=None, dropout=None
    )
    config.surgery, config.train.steps = ({"name": "quantize"},), 0
    stage.run(config, tmp_path / "int8")
    int8 = str(tmp_path / "int8" / "model")
    both = {"hidden": 1.0, "teachers": ({"teacher": teacher, "weight": 1.0}, {"teacher": int8, "weight": 0.0})}
    stage.run(student(both, steps=2), tmp_path / "both")
    stage.run(student({"hidden": 1.0}, steps=2), tmp_path / "first")
    assert close(tmp_path / "both", tmp_path / "first", 1e-6)
    alone = stage.run(student({"teacher": int8, "alpha": 1.0}, steps=2), tmp_path / "alone")
    assert np.isfinite(alone["metrics"]["train"]["response"])
    assert not close(tmp_path / "alone", tmp_path / "first", 1e-6)


def test_a_teacher_of_another_width_depth_and_family(student, tmp_path):
    """A narrower llama with grouped queries and a longer table learns everything from a gpt2."""
    model = {
        "family": "llama",
        "hidden_size": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "vocab_size": 80,
        "max_positions": None,
    }
    options = {"hidden": 1.0, "attention": 1.0, "attention_on": "scores", "relations": 1.0, "layers": "last"}
    result = stage.run(student(options, model, steps=2, grad_accum=2), tmp_path / "llama")
    kinds = {name.partition("_")[0] for name in result["metrics"]["train"]}
    assert {"response", "hidden", "attention", "query", "key", "value"} <= kinds
    assert all(np.isfinite(value) for value in result["metrics"]["train"].values())
    assert "distill/teacher_0/projection/kernel" not in parameters(tmp_path / "llama")


@pytest.mark.full
def test_on_a_mesh_as_on_one_device(student, teacher, devices, tmp_path):
    """A live teacher looked into and a cached one, over a vocabulary that does not divide."""
    cached = {"teacher": teacher, "cache": {"directory": str(tmp_path / "cache"), "top_k": 5}}
    both = {"teachers": ({"teacher": teacher, "hidden": 1.0, "attention": 1.0, "relations": 1.0}, cached)}
    metrics = []
    for count, mesh in ((1, {}), (4, {"data": 2, "tensor": 2})):
        devices(count)
        config = student(both, {"dropout": 0.0}, steps=1)
        config.mesh.update(mesh)
        metrics.append(stage.run(config, tmp_path / str(count))["metrics"]["train"])
    one_device, four = metrics
    assert len(one_device) > 10
    for name in one_device.keys() - {"tokens_per_second"}:
        assert np.isclose(four[name], one_device[name], rtol=1e-3, atol=1e-6), name


def test_the_student_writes_and_the_teacher_judges(student, tmp_path, cut_at):
    """Every step its own text: no cross-entropy of it, a response at every place; resumed to the same bits."""
    config = student({"on_policy": {"prompt": 8}, "divergence": "reverse"})
    whole = stage.run(config, tmp_path / "whole")
    train = whole["metrics"]["train"]
    assert train["cross_entropy"] == 0.0 and train["response"] > 0
    cut_at(4)
    with pytest.raises(ConnectionAbortedError):
        stage.run(config, tmp_path / "run")
    cut_at(None)
    assert stage.run(config, tmp_path / "run")["params_sha256"] == whole["params_sha256"]


@pytest.mark.full
def test_a_classifier_learns_from_a_cache_by_weighed_samples(recipe, tmp_path):
    """One answer a text, over all its classes; the file's weights reach the config: 0 everywhere teaches nothing."""
    lines = [
        {"text": f"{'good' if i % 2 else 'bad'} film {i}", "label": str(i % 2), "weight": float(i % 3)}
        for i in range(24)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))

    def config(**train):
        config = recipe(steps=3, checkpoint_every=0, **train)
        config.task = "sequence"
        config.data.update(format="jsonl", train=str(path), eval=str(path), documents="file")
        return config

    stage.run(config(), tmp_path / "teacher")
    learn = {
        "name": "distill",
        "teacher": str(tmp_path / "teacher" / "model"),
        "alpha": 1.0,
        "sample_weight": "weight",
        "cache": {"directory": str(tmp_path / "cache"), "dtype": "float32"},
    }
    student = config()
    student.losses = (learn,)
    result = stage.run(student, tmp_path / "student")
    assert result["metrics"]["train"]["response"] > 0
    assert json.loads((tmp_path / "cache/cache.json").read_text())["layout"]["top_k"] == 2
    (tmp_path / "nothing.jsonl").write_text("\n".join(json.dumps(line | {"weight": 0}) for line in lines))
    learn.pop("cache")
    student.losses, student.data.train = (learn,), str(tmp_path / "nothing.jsonl")
    assert stage.run(student, tmp_path / "nothing")["metrics"]["train"]["response"] == 0


# The entry -----------------------------------------------------------------------------------------------------------


def test_options_of_the_entry_are_defaults_of_its_teachers():
    entry = {
        "name": "distill",
        "alpha": 0.7,
        "temperature": 3.0,
        "teachers": [{"teacher": "a", "weight": 0.5}, {"teacher": "b", "weight": 0.5, "temperature": 1.0}],
    }
    shared, by_teacher = split_options(entry, "config.losses: distill")
    assert shared == {"alpha": 0.7}
    assert [options["temperature"] for options in by_teacher] == [3.0, 1.0]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"teacher": "a", "temprature": 2.0},
            "config.losses: distill has no option 'temprature'; did you mean 'temperature'",
        ),
        ({"teachers": [{"teacher": "a", "alpha": 0.3}]}, "has no option 'alpha'"),
        ({"teacher": "a", "teachers": [{"teacher": "b"}]}, "teacher beside teachers"),
        ({}, "needs a teacher"),
        ({"teachers": [{"weight": 1.0}]}, "needs a teacher"),
        ({"teacher": "a", "cache": {"directory": "x"}, "hidden": 1.0}, "a cache holds a teacher's answers only"),
        ({"teacher": "a", "cache": {"directory": "x"}, "on_policy": {"prompt": 3}}, "not to what the student writes"),
    ],
)
def test_wrong_entries_are_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        distillation({"name": "distill", **entry}, teachers=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": {"dir": "x"}}, "config.losses: cache has no option 'dir'; known: directory"),
        ({"on_policy": {"lenght": 3}}, "on_policy has no option 'lenght'"),
        ({"on_policy": {"temperature": -1.0}}, "temperature -1.0 is negative"),
        ({"teacher": "", "cache": {"directory": "nowhere"}}, "nowhere holds no teacher's answers"),
    ],
)
def test_wrong_sections_are_refused(student, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        stage.run(student(options), tmp_path / "refused")


def test_there_is_nothing_to_write_without_a_cache(student):
    with pytest.raises(ValueError, match=r"no teacher in config.losses has a cache"):
        cache_teachers(student({}))


def test_a_teacher_of_shorter_rows_is_refused(student, tmp_path):
    config = student({}, {"max_positions": 64})
    config.data.max_length = 48
    with pytest.raises(ValueError, match=r"reads 32 tokens at most, but config.data.max_length = 48"):
        stage.run(config, tmp_path / "refused")
