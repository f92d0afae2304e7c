"""The benchmarks: how numbers are put beside each other, and that every program explains itself."""

import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def turns() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        return importlib.import_module("turns")


def test_ratio_is_of_medians_and_spread_of_rounds(turns: ModuleType):
    row = turns.Comparison("step", "s", jaxlm=[1.0, 2.0, 4.0], other=[3.0, 3.0, 6.0])
    assert row.ratio == 1.5
    assert row.spread == (1.5, 3.0)
    assert "| step | 2 s | torch: 3 s | **1.5** | 1.5 to 3 |  |" in turns.table([row])


@pytest.mark.parametrize(("seconds", "missed"), [(2.0, False), (2.1, True), (math.inf, True), (math.nan, True)])
def test_a_floor_is_held_or_missed(turns: ModuleType, seconds: float, missed: bool):
    row = turns.Comparison("step", "s", jaxlm=[seconds], other=[3.0], floor=1.5)
    assert row.below is missed
    assert turns.table([row]).endswith("1.5, missed |" if missed else "| 1.5 |")


def test_a_score_that_is_not_reached_takes_for_ever(turns: ModuleType):
    curve = [(1.0, 0.5), (2.0, 0.8), (3.0, 0.7)]
    assert turns.first_reaching(curve, 0.7, higher=True) == 2.0
    assert turns.first_reaching(curve, 0.9, higher=True) == math.inf
    assert turns.first_reaching(curve, 0.5, higher=False) == 1.0
    assert "never" in turns.table([turns.Comparison("to 0.9", "s", [math.inf], [2.0])])


def test_sides_alternate(turns: ModuleType):
    order: list[str] = []
    sides = {name: lambda name=name: order.append(name) or {"n": len(order)} for name in ("jaxlm", "torch")}
    found = turns.in_turn(sides, 2, "test")
    assert order == ["jaxlm", "torch"] * 2
    assert found["torch"] == [{"n": 2}, {"n": 4}]


def test_the_last_json_line_of_a_program_is_its_result(turns: ModuleType, tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text("print('a notice'); print('{\"a\": 1}'); print('{\"a\": 2}')")
    assert turns.program([program]) == {"a": 2}
    program.write_text("raise ValueError('no such file')")
    with pytest.raises(SystemExit, match="no such file"):
        turns.program([program])


def test_curve_of_a_run(turns: ModuleType, tmp_path: Path):
    lines = [
        {"step": 1, "split": "train", "time": 11.0, "loss": 3.0},
        {"step": 1, "split": "eval", "time": 12.0, "loss": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert turns.evaluations(tmp_path, "loss", began=10.0) == [(2.0, 2.0)]


@pytest.mark.parametrize(
    "name", ["step", "characters", "finetune", "input", "growth", "precision", "convert_memory", "run"]
)
def test_explains_itself(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 0
    assert f"python bench/{name}.py" in capsys.readouterr().out
