"""A search over a tiny pipeline: sweeps, goes on after a cut, and reports the front."""

import json
import random

import pytest

from jaxlm.runner import search
from jaxlm.runner.config import default_config

pytestmark = pytest.mark.slow

WORDS = ("good", "bad", "fine", "poor", "film", "plot", "we", "saw", "a")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("search"), random.Random(1)
    for split, rows in (("train", 32), ("eval", 24)):
        lines = [" ".join(draw.choices(WORDS, k=draw.randint(2, 9))) for _ in range(rows)]
        (folder / f"{split}.tsv").write_text("".join(f"{line}\t{int('good' in line)}\n" for line in lines))
    return folder


def tiny(files):
    config = default_config()
    config.task = "sequence"
    config.data.update(format="tsv", columns=("text", "label"), tokenizer="wordpiece:60", max_length=16)
    config.data.update(train=str(files / "train.tsv"), eval=str(files / "eval.tsv"))
    config.model.update(family="bert", hidden_size=16, num_layers=1, num_heads=2, ffn_size=16, max_positions=16)
    config.train.batch_size = 8
    config.report.update(rounds=3, seconds=0.1, batch_size=8)
    config.stages = (
        {"name": "whole", "description": "as drawn"},
        {
            "name": "small",
            "description": "FFN units cut out",
            "after": "whole",
            "reference": "whole",
            "surgery": ({"name": "prune"},),
        },
    )
    config.search.vary = ({"stage": "small", "field": "surgery.0.ffn", "low": 0.0, "high": 0.75},)
    config.search.trials = 3
    return config


def test_a_strength_is_swept_and_a_search_goes_on_where_it_was(files, tmp_path, monkeypatch):
    config, scores = tiny(files), search.score

    def cut(row, *others):
        if row.name == "ffn 0.375":
            raise KeyboardInterrupt
        return scores(row, *others)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(search, "score", cut)
        search.run(config, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("stages/*/result.json")}
    rows = search.run(config, tmp_path)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("stages/*/result.json")}
    assert len(before) == 3 and before.items() <= after.items() and len(after) == 4
    assert [row.name for row in rows] == ["whole", "ffn 0", "ffn 0.75", "ffn 0.375"]
    assert [row.layers[0].ffn for row in rows] == [16, 16, 4, 10]
    study = json.loads((tmp_path / "search.json").read_text())
    assert sorted(t["values"]["small.surgery.0.ffn"] for t in study["trials"]) == [0.0, 0.375, 0.75]
    assert [t["size"] for t in study["trials"]] == [rows[i].bytes_on_disk for i in (1, 2, 3)]
    assert any(t["on_front"] for t in study["trials"]) and (tmp_path / "report.html").exists()


def planned(files, vary, trials):
    config = tiny(files)
    config.search.vary, config.search.trials = vary, trials
    return search.Space(config).planned()


def test_what_is_tried_first(files):
    share = {"stage": "small", "field": ("surgery.0.ffn", "surgery.0.heads"), "values": (0.0, 0.5)}
    steps = {"stage": "small", "field": "train.steps", "low": 1, "high": 100, "log": True}
    assert [v["small.train.steps"] for v in planned(files, (steps,), 3)] == [1, 10, 100]
    both = planned(files, (share, {**share, "field": "train.seed", "stage": "small"} | {"field": "seed"}), 4)
    assert len(both) == 4  # all combinations
    ends = planned(files, (share, steps), 9)
    assert ends == [
        {"small.surgery.0.ffn": 0.0, "small.train.steps": 1},
        {"small.surgery.0.ffn": 0.5, "small.train.steps": 100},
    ]
    config = tiny(files)
    config.search.vary = (share,)
    changed = search.Space(config).with_values({"small.surgery.0.ffn": 0.5})
    assert changed.stages[1]["surgery"] == [{"name": "prune", "ffn": 0.5, "heads": 0.5}]
    assert config.stages[1]["surgery"] == ({"name": "prune"},)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vary": ()}, "config.search.vary is empty"),
        ({"vary": ({"stage": "smal", "field": "seed", "low": 0, "high": 1},)}, "did you mean 'small'"),
        ({"vary": ({"stage": "small", "field": "surgery.0.fnn", "low": 0, "high": 1},)}, "did you mean 'ffn'"),
        ({"vary": ({"stage": "small", "field": "surgery.1.ffn", "low": 0, "high": 1},)}, "has 1 entries of surgery"),
        ({"vary": ({"stage": "small", "field": "trian.steps", "low": 0, "high": 1},)}, "no field 'trian.steps'"),
        ({"vary": ({"stage": "small", "field": "seed", "low": 1, "high": 1},)}, "low must be below high"),
        ({"vary": ({"stage": "small", "field": "seed", "from": 1},)}, "from, high, low in"),
        ({"cost": "sise"}, "config.search.cost = 'sise'; known: size, flops, speed, latency"),
        ({"stage": "whole"}, "stage whole has no reference"),
    ],
)
def test_what_cannot_be_searched_is_refused(files, tmp_path, change, message):
    config = tiny(files)
    config.search.update(change)
    with pytest.raises(ValueError, match=message):
        search.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
