"""The column `weight`: read where data have it, padded with NaN, refused where it is no weight."""

import numpy as np
import pytest

from jaxlm.data.sources import read
from jaxlm.tasks.task import sample_weights


def source(tmp_path, rows):
    path = tmp_path / "data.csv"
    path.write_text("text,label,weight\n" + "\n".join(rows))
    return read("csv", str(path))


def test_weights_are_numbers(tmp_path):
    rows = source(tmp_path, ["a,0,1.5", "b,1,0"])
    assert np.array_equal(sample_weights(list(rows), rows)["weight"], np.float32([1.5, 0.0]))
    assert sample_weights([{"text": "a"}], rows) == {}


@pytest.mark.parametrize("bad", ["heavy", "-1", "nan", ""])
def test_what_is_no_weight_is_refused(tmp_path, bad):
    rows = source(tmp_path, ["a,0,1.5", f"b,1,{bad}"])
    with pytest.raises(ValueError, match=r"column 'weight' must hold a number of 0 or more"):
        sample_weights(list(rows), rows)
    with pytest.raises(ValueError, match="column 'weight'"):
        sample_weights([{"weight": 1.0}, {}], rows)
