"""A pipeline of tiny stages: done once, done again only where inputs changed, and reported."""

import json
import random

import pytest

import jaxlm
from jaxlm.build import registry
from jaxlm.build.config import default_config
from jaxlm.build.pipeline import run, stage_config


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
            "surgery": ({"name": "prune", "heads": 1 / 3, "ffn": 0.5},),
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
        own = stage_config(config, {"name": "student", **change}, {"teacher": tmp_path / "teacher"})
        for entry in own.surgery:
            registry.make(registry.SURGERY, entry, "surgery", model=None, params=None, axes=None)


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
