"""The recipes under configs/reproduce, their criteria, and the tables that follow from reports."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jaxlm.evaluate.comparison import ModelResult
from jaxlm.evaluate.per_example import Estimate, PerExampleResults
from jaxlm.evaluate.timing import Ratio, Timing
from jaxlm.report import document
from jaxlm.report.acceptance import Criterion, Results, at_least, at_most, positive
from jaxlm.runner import reproduce
from jaxlm.runner.config import plain

ROOT = Path(__file__).resolve().parents[2]
RECIPES = reproduce.recipes(ROOT / "configs" / "reproduce")


def made_up(task: str, quality: float, examples: int = 200) -> PerExampleResults:
    draw = np.random.default_rng(0)
    hard = draw.random(examples)
    if task == "causal":
        sizes = (1000,) * examples
        nats = tuple(1000 * quality * (1 + 0.1 * hard))
        columns = {"nats": nats, "tokens": sizes, "bytes": sizes}
    elif task == "token":
        right = tuple(map(int, hard < quality))
        columns = {"entities_right": right, "entities_predicted": (1,) * examples, "entities_true": (1,) * examples}
        columns |= {"right": right, "words": (1,) * examples}
    else:
        columns = {"true": (1,) * examples, "predicted": tuple(map(int, hard < quality))}
    return PerExampleResults(task, columns | {"agreed": (1,) * examples, "compared": (1,) * examples}, classes=2)


def rows_of(config) -> list[ModelResult]:
    """A row a stage, later ones a little worse, smaller and faster; no model was trained for them."""
    rows = []
    for i, stage in enumerate(plain(config.stages)):
        worse = 1 + 0.01 * i if config.task == "causal" else 0.9 - 0.01 * i
        rows.append(
            ModelResult(
                name=stage["name"],
                description=stage["description"],
                parameters=1000 - i,
                parameters_non_embedding=800 - i,
                bytes_on_disk=4000 - 10 * i,
                reference=stage.get("reference"),
                beside=tuple(stage.get("beside", ())),
                batch=Timing((1.0 / (1 + i), 1.1 / (1 + i), 1.2 / (1 + i))),
                batch_tokens=100,
                single=Timing((0.1, 0.1, 0.1)),
                held_out=made_up(config.task, worse),
            )
        )
    return rows


@pytest.mark.parametrize("name", RECIPES)
def test_the_criteria_of_a_recipe_are_about_its_stages(name):
    recipe = reproduce.read(RECIPES[name])
    criteria = recipe.criteria(Results(rows_of(recipe.get_config())))
    assert criteria and all(
        isinstance(criterion, Criterion) and criterion.measured and criterion.target for criterion in criteria
    )
    assert len({criterion.what for criterion in criteria}) == len(criteria)


@pytest.mark.parametrize("name", RECIPES)
def test_places_are_put_where_recipes_name_them(name):
    config = reproduce.located(reproduce.read(RECIPES[name]).get_config(), "/data", "/encoder")
    assert "DATA" not in str(config.data.to_dict()) and "ENCODER" not in str(config.model.init)
    assert config.data.train.startswith("/data/") and config.model.init in ("", "/encoder")


@pytest.mark.parametrize("name", RECIPES)
def test_the_document_has_a_place_for_every_recipe(name):
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    again = reproduce.rewritten(text, name, "new")
    assert again.count("<!-- reproduce:") == text.count("<!-- reproduce:") and "new" in again
    with pytest.raises(ValueError, match="no place for other: lines with <!-- reproduce: other -->"):
        reproduce.rewritten(text, "other", "new")


def test_tables_follow_from_the_reports_that_are_there(tmp_path):
    results = tmp_path / "results.md"
    results.write_text("before\n" + "".join(f"<!-- reproduce: {n} -->\nold\n<!-- end: {n} -->\n" for n in RECIPES))
    rows = rows_of(reproduce.read(RECIPES["sst2"]).get_config())
    (tmp_path / "runs" / "sst2").mkdir(parents=True)
    protocol = dict.fromkeys(document.PROTOCOL, "made up")
    (tmp_path / "runs" / "sst2" / "report.json").write_text(document.to_json(rows, protocol, "T", 0.05))
    criteria = reproduce.run(ROOT / "configs/reproduce", tmp_path / "runs", results, "", "", only_tables=True)
    text = results.read_text()
    assert "| three layers: distilled minus undistilled | " in text and "| **no** |" in text
    assert "| student | 995 (795 non-embedding) | 3.95 kB (" in text and text.count("old") == len(RECIPES) - 1
    assert len(criteria) == text.count("| yes |") + text.count("| **no** |")
    assert reproduce.run(ROOT / "configs/reproduce", tmp_path / "runs", results, "", "", only_tables=True) == criteria
    assert results.read_text() == text


def test_criteria_are_judged_by_their_middle_and_gains_by_their_interval():
    assert at_least("speed", Ratio(1.7, 1.5, 1.8), 1.6) == Criterion("speed", "1.70× (1.50–1.80)", "≥ 1.6", True)
    assert at_most("size", 0.31, 0.3, "%") == Criterion("size", "31.0%", "≤ 30%", False)
    assert at_least("smaller", 3.2, 3.0, "×").measured == "3.20×"
    assert positive("gain", Estimate(0.012, 0.011), "points").passed
    assert positive("gain", Estimate(0.012, 0.011), "points").measured == "+1.2 ± 1.1 points"
    assert not positive("gain", Estimate(0.012, 0.013), "points").passed
    assert not at_least("broken", Estimate(float("nan"), None), 0.5).passed


def test_what_one_may_ask_of_models():
    rows = rows_of(reproduce.read(RECIPES["sst2"]).get_config())
    names = [row.name for row in rows]
    results = Results(rows)
    teacher, last = names[0], names[-1]
    a, b = (results.held_out(name).quality.value for name in (last, teacher))
    assert results.share(last, teacher).value == pytest.approx(a / b)
    assert results.gain(last, teacher).value == pytest.approx(a - b) and results.gain(last, teacher).error > 0
    assert results.recovered(last, last, teacher).value == 0 and results.recovered(teacher, last, teacher).value == 1
    assert results.recovers("x", last, last, teacher, 0.5) == Criterion("x", "0.0 ± 0.0%", "≥ 50%", False)
    nothing = results.recovers("x", last, teacher, last, 0.5)
    assert nothing.measured.startswith("no loss shown: +") and nothing.passed is None
    assert "| open |" in reproduce.criteria_table([nothing])
    assert results.parameters(last, teacher, embeddings=True) > results.parameters(last, teacher)
    with pytest.raises(ValueError, match="did you mean 'teacher'"):
        results.row("techer")
    text = Results(rows_of(reproduce.read(RECIPES["gpt"]).get_config()))
    assert text.gain("dense", "wanda").value > 0 and text.rise("wanda", "dense", "perplexity").value > 0
    untimed = dataclasses.replace(rows[1], batch=None, batch_tokens=None)
    with pytest.raises(ValueError, match="were not timed"):
        Results([rows[0], untimed]).speed(untimed.name, teacher)
