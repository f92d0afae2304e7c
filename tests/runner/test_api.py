"""A stage and a report from Python: the lines of the README, and what they refuse."""

import json
from pathlib import Path

import pytest

import jaxlm
from jaxlm.runner import stage
from jaxlm.runner.api import configured
from jaxlm.runner.config import plain

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "stdlib[:20%]": "stdlib[:4]",
    "stdlib[99%:]": "stdlib[4:6]",
    '"max_length": 128': '"max_length": 16',
    '"max_positions": 128': '"max_positions": 16',
    '"hidden_size": 128': '"hidden_size": 16',
    '"num_layers": 4': '"num_layers": 2',
    "bpe:1024": "bpe:300",
    '"steps": 200': '"steps": 2',
    '"steps": 50': '"steps": 2',
    "data=data)\n```": 'data=data, report={"seconds": 0.1, "rounds": 3})',
}
"""Sizes of the README's example, and those to run it with here."""

pytestmark = [pytest.mark.usefixtures("quick_to_compile"), pytest.mark.slow]


def example() -> str:
    """The README's lines from Python, made small."""
    code = (ROOT / "README.md").read_text("utf-8").partition("**From Python.**")[2].partition("```python\n")[2]
    code = code.partition("```")[0] + "```"
    for size, tiny in TINY.items():
        assert code.count(size) == 1, size
        code = code.replace(size, tiny)
    return code


def test_the_lines_of_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(example(), {})
    table = capsys.readouterr().err
    assert all(name in table for name in ("gpt", "small", "int8"))
    assert (tmp_path / "runs/report/report.html").is_file()
    small, gpt = jaxlm.load("runs/small/model"), jaxlm.load("runs/gpt/model")
    assert [2 * units for units in small.config.ffn_size] == [*gpt.config.ffn_size]


def test_a_run_from_python_is_a_run_from_a_file(recipe, tmp_path):
    config = recipe(steps=2)
    sections = {name: value for name, value in plain(config).items() if name != "stages"}
    model = jaxlm.run_stage(tmp_path / "python", **sections)
    result = stage.run(config, tmp_path / "file")
    assert json.loads((tmp_path / "python/result.json").read_text())["params_sha256"] == result["params_sha256"]
    assert model == str(tmp_path / "python/model")
    with pytest.raises(ValueError, match="another config"):
        jaxlm.run_stage(tmp_path / "python", **sections | {"seed": 1})


def test_a_field_that_does_not_exist_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
        configured({"train": {"learning_rat": 1.0}})


def test_nothing_to_measure_on(recipe, tmp_path):
    config = recipe(steps=1)
    model = jaxlm.run_stage(tmp_path / "run", data=config.data, model=config.model, train=config.train)
    with pytest.raises(ValueError, match=r"config\.data\.eval"):
        jaxlm.compare(tmp_path / "report", {"one": model}, data=config.data.to_dict() | {"eval": ""})
