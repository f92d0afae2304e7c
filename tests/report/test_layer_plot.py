import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

import jaxlm
from jaxlm.core import Masked, map_leaves
from jaxlm.evaluate.layer_stats import layer_statistics
from jaxlm.io.lm import LM
from jaxlm.models import model_config
from jaxlm.report.layer_plot import draw, shown
from jaxlm.runner import registry


@pytest.fixture
def stored(tmp_path):
    """`stored(*surgery)`: the layers of a small model after surgery, from its directory."""

    def make(*surgery, native=False, family="gpt2", change=lambda path, leaf: leaf, **more):
        options = {"vocab_size": 20, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "ffn_size": 24, **more}
        lm = LM.initialize(model_config(family, **options), jax.random.key(0))
        lm = lm.replace(params=map_leaves(change, lm.params))
        for entry in surgery:
            lm = registry.operate(entry, lm)
        jaxlm.save(lm, tmp_path / "model", native=native)
        lm = jaxlm.load(tmp_path / "model")
        return layer_statistics(lm.config, lm.params, tmp_path / "model")

    return make


@pytest.mark.parametrize("native", [False, True])
def test_a_plain_model_has_32_bits_and_no_zeros(stored, native):
    layers = stored(native=native)
    assert [(layer.name, layer.heads, layer.ffn) for layer in layers] == [("0", 4, 24), ("1", 4, 24)]
    assert all(layer.bits == 32 and layer.zeros == 0 for layer in layers)


def test_what_pruning_and_rounding_leave(stored):
    (first, _) = stored({"name": "prune", "heads": 0.5, "ffn": 0.5})
    assert (first.heads, first.ffn, first.bits) == (2, 12, 32)
    (first, _) = stored({"name": "quantize"})
    assert 8 < first.bits < 12 and first.zeros < 0.1
    (only,) = stored({"name": "keep_layers", "keep": (1,)})
    assert only.name == "0"


def test_groups_and_width_of_a_narrower_model_with_shared_keys(stored):
    llama = {"family": "llama", "num_kv_heads": 2}
    whole, narrow = stored(**llama)[0], stored({"name": "prune", "hidden": 0.5}, **llama)[0]
    assert (whole.heads, whole.groups, whole.width, narrow.width) == (4, 2, 16, 8)
    few = stored({"name": "prune", "heads": 0.5}, **llama)[0]
    assert (few.heads, few.groups) == (2, 1)


def test_zeros_are_counted_behind_a_mask(stored):
    def half(path, leaf):
        return Masked(leaf, np.arange(leaf.size).reshape(leaf.shape) % 2 == 0) if path.endswith("/kernel") else leaf

    assert stored(change=half)[0].zeros == pytest.approx(0.5, abs=0.02)


def test_an_encoder_decoder_has_both_stacks(stored):
    assert [layer.name for layer in stored(family="t5")] == ["e0", "e1", "d0", "d1"]


def test_panels_show_what_differs(rows, classifiers):
    assert [panel.title for panel in shown(rows)] == [
        "Heads",
        "FFN units",
        "Entries that are not zero",
        "Bits on disk per entry",
    ]
    grouped = [dataclasses.replace(r, layers=tuple(x._replace(groups=1) for x in r.layers)) for r in rows[:1]]
    assert "KV groups" in [panel.title for panel in shown([*grouped, *rows[1:]])]
    assert shown(classifiers) == []  # one model's layers, all alike
    shorter = dataclasses.replace(classifiers[1], layers=classifiers[0].layers[:3])
    assert [panel.title for panel in shown([classifiers[0], shorter])] == ["Heads"]


@pytest.mark.parametrize("dark", [False, True])
def test_the_picture_has_a_row_a_model(rows, make, tmp_path, dark):
    draw(rows, tmp_path / "some.png", dark=dark, stacked=dark)
    more = [*rows, make.row("deep", 5, layers=make.layers((4,) * 30, 64))]
    draw(more, tmp_path / "more.png", dark=dark, stacked=dark)
    sizes = [Image.open(tmp_path / f"{name}.png").size for name in ("some", "more")]
    assert sizes[0][1] < sizes[1][1] and (sizes[0][1] > sizes[0][0]) == dark
    corner = Image.open(tmp_path / "some.png").convert("RGB").getpixel((0, 0))
    assert (max(corner) < 60) == dark
