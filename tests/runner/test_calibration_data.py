"""`config.calibration`: which rows are read, and that none of them is evaluated on."""

import numpy as np
import pytest

import jaxlm
from jaxlm.core import Masked, flatten
from jaxlm.data.settings import CalibrationSettings, DataSettings
from jaxlm.runner import run_setup, stage
from jaxlm.runner.calibration_data import calibration_location, fillers, only, read_calibration
from jaxlm.runner.run_setup import apply_surgery, prepare_run
from jaxlm.tasks import TASKS


def test_a_stage_prunes_with_the_training_text(recipe, tmp_path):
    config = recipe(steps=0)
    config.calibration.update(samples=5, length=16, batch_size=2)
    config.surgery = ({"name": "wanda", "pattern": "2:4"},)
    result = stage.run(config, tmp_path)
    assert result["data"]["calibration"]["source"] == config.data.train
    assert result["data"]["calibration"]["samples"] == 5 and 20 < result["data"]["calibration"]["tokens"] <= 5 * 16
    leaves = flatten(jaxlm.load(tmp_path / "model").params)
    masked = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Masked)}
    assert len(masked) == 2 * 6
    assert all(np.asarray(leaf.mask).mean() == 0.5 for leaf in masked.values())
    assert all(not np.asarray(leaf.base)[~np.asarray(leaf.mask)].any() for leaf in masked.values())


def test_nothing_is_read_where_nothing_asks(recipe, monkeypatch):
    config = recipe(steps=0)
    config.surgery = ({"name": "quantize"},)
    monkeypatch.setattr(run_setup, "read_calibration", pytest.fail)
    assert apply_surgery(prepare_run(config, splits=())).calibration is None


@pytest.mark.parametrize("name", ["eval", "test"])
def test_evaluation_data_are_refused(recipe, name):
    config = recipe(steps=0)
    config.data.test = config.data.train.replace("train", "eval") + "[5:]"
    config.surgery = ({"name": "wanda", "sparsity": 0.5},)
    for source, message in (
        (name, f"config.calibration.source = '{name}': what a model is made from must not be what it is measured on"),
        (
            config.data[name],
            "config.calibration.source reads .*: a model must not be evaluated on data that it is made",
        ),
    ):
        config.calibration.source = source
        with pytest.raises(ValueError, match=message):
            apply_surgery(prepare_run(config, splits=()))


def test_calibration_is_not_an_argument_of_the_entry(recipe):
    config = recipe(steps=0)
    config.surgery = ({"name": "wanda", "sparsity": 0.5, "calibration": "x"},)
    with pytest.raises(ValueError, match=r"config.surgery: wanda has no option 'calibration'"):
        apply_surgery(prepare_run(config, splits=()))


def test_rows_beyond_the_positions_are_refused(recipe):
    config = recipe(steps=0)
    config.calibration.length = 33
    config.surgery = ({"name": "wanda", "sparsity": 0.5},)
    with pytest.raises(ValueError, match=r"config.calibration.length = 33, but the model has 32 positions"):
        apply_surgery(prepare_run(config, splits=()))


@pytest.mark.parametrize("field", ["samples", "length", "batch_size"])
def test_nothing_at_all_is_refused(field):
    with pytest.raises(ValueError, match=rf"config.calibration.{field} = 0: must be at least 1"):
        CalibrationSettings(**{field: 0})


def test_places_that_may_share_rows_are_refused(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x")
    data = DataSettings(train=f"{tmp_path}/*.txt", eval=f"{tmp_path}/b.txt")
    with pytest.raises(ValueError, match=r"reads '.*\*.txt', which may share rows with config.data.eval = '.*b.txt'"):
        calibration_location("train", data)
    assert calibration_location(f"{tmp_path}/a.txt", data) == f"{tmp_path}/a.txt"


def test_a_source_must_be_there():
    with pytest.raises(ValueError, match=r"config.data.train is empty; name a place"):
        calibration_location("train", DataSettings())


# Which rows are taken -------------------------------------------------------------------------------------------------


def calibration_of(config, **settings):
    setup = prepare_run(config, splits=())
    lm = setup.lm
    return read_calibration(
        CalibrationSettings(**settings), "causal", TASKS["causal"], lm.tokenizer, lm.config, setup.data, 0
    )


def tokens(calibration):
    return sum(int((batch["segment_ids"] > 0).sum()) for batch in calibration.batches)


def test_as_many_rows_as_asked_for_or_there_are(recipe):
    few = calibration_of(recipe(), samples=5, batch_size=4)
    assert [len(batch["input_ids"]) for batch in few.batches] == [4, 4], "one shape"
    assert [int((batch["segment_ids"] > 0).any(1).sum()) for batch in few.batches] == [4, 1]
    assert few.facts() == {"source": recipe().data.train, "samples": 5, "tokens": tokens(few)}
    every = calibration_of(recipe(), samples=10**6, batch_size=7)
    rows = np.concatenate([b["segment_ids"] for b in every.batches])
    filled = rows[(rows > 0).any(1)]
    assert len(filled) < len(rows) and (filled > 0).sum() == tokens(every), "fillers are padding"
    again = calibration_of(recipe(), samples=5, batch_size=4)
    assert all(np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(few.batches, again.batches, strict=True))


def test_fillers_and_what_only_keeps():
    batch = {
        "input_ids": np.ones((3, 4), np.int32),
        "attention_mask": np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]]),
        "labels": np.array([1.0, np.nan, 2.0]),
    }
    assert fillers(batch).tolist() == [False, True, False]
    kept = only(batch, np.array([2]))
    assert kept["attention_mask"].sum(1).tolist() == [0, 0, 1] and np.isnan(kept["labels"]).tolist() == [1, 1, 0]
    batch["labels"] = np.array([[-100] * 4, [-100] * 4, [3, -100, -100, -100]])
    assert fillers(batch).tolist() == [False, True, False], "a row of several tokens is data, predicted or not"
