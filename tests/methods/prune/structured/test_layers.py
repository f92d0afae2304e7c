"""Whole layers by number."""

import numpy as np
import pytest

from jaxlm.core import flatten
from jaxlm.methods.prune.structured.depth import drop_layers, keep_layers


def test_keep_layers_is_the_layers_kept(tools):
    lm = tools.lm_of("MHA")
    small = keep_layers(lm, keep=(0, 2))
    assert small.config.num_layers == 2 and "layers_2/mlp/up/kernel" not in small.axes
    for new, old in ((0, 0), (1, 2)):
        assert np.array_equal(
            flatten(small.params)[f"layers_{new}/mlp/up/kernel"], flatten(lm.params)[f"layers_{old}/mlp/up/kernel"]
        )


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [("MHA", (0, 3), r"\[3\] chosen of 0..2"), ("MHA", (), "none"), ("T5", (0,), "two stacks")],
)
def test_keep_layers_refuses(name, keep, message, tools):
    with pytest.raises(ValueError, match=message):
        keep_layers(tools.lm_of(name), keep=keep)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"share": 1.0}, "share must be in"), ({"share": 0.5, "score": "tailor"}, "did you mean 'taylor'")],
)
def test_drop_layers_refuses(options, message, tools):
    lm = tools.lm_of("MHA")
    with pytest.raises(ValueError, match=message):
        drop_layers(lm, tools.context_of(tools.calibration_of(lm)), **options)
