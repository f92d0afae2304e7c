"""Tiny runs: a few kilobytes of text, a model of two layers, one device unless a test asks for more."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from jaxlm.data.prefetch import prefetch
from jaxlm.parallel import make_mesh
from jaxlm.runner import run_setup, trainer
from jaxlm.runner.config import default_config

WORDS = tuple(
    word
    for line in ("the cat sat on a mat while dogs ran over hills", "and we saw red birds sing in old trees near water")
    for word in line.split()
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with `train.txt` (60 lines) and `eval.txt` (13), a document a line."""
    folder, draw = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for name, lines in (("train", 60), ("eval", 13)):
        documents = [" ".join(draw.choices(WORDS, k=draw.randint(3, 30))) + "." for _ in range(lines)]
        (folder / f"{name}.txt").write_text("\n".join(documents) + "\n")
    return folder


@pytest.fixture
def recipe(corpus) -> Callable[..., ConfigDict]:
    """`recipe(train field=value, ...)`: a GPT-2 of two layers over characters."""

    def make(**train) -> ConfigDict:
        config = default_config()
        config.data.update(format="text", documents="line", tokenizer="character", max_length=32)
        config.data.update(train=str(corpus / "train.txt"), eval=str(corpus / "eval.txt"))
        config.model.update(family="gpt2", hidden_size=32, num_layers=2, num_heads=2, max_positions=32, dropout=0.1)
        config.train.update(steps=12, batch_size=8, log_every=2, checkpoint_every=4)
        config.train.update(**train)
        return config

    return make


@pytest.fixture
def devices(monkeypatch) -> Callable[[int], None]:
    """`devices(n)`: runs see the first n devices."""

    def use(count: int) -> None:
        monkeypatch.setattr(run_setup, "make_mesh", lambda shape: make_mesh(shape, jax.devices()[:count]))

    return use


@pytest.fixture(autouse=True)
def one_device(devices) -> None:
    devices(1)


@pytest.fixture(scope="module")
def quick_to_compile():
    """A few steps of tiny models: what counts is the time of compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def cut_at(monkeypatch) -> Callable[..., None]:
    """`cut_at(step, signal)`: before that step this process gets the signal, or without one, is as good as gone."""

    def use(step: int | None, number: int | None = None) -> None:
        class Feed(prefetch):
            def __init__(self, batches, start, stop, **options):
                super().__init__(batches, start, stop, **options)
                self.step = start

            def __next__(self):
                self.step += 1
                if self.step == step and number is None:
                    raise ConnectionAbortedError
                if self.step == step:
                    os.kill(os.getpid(), number)
                return super().__next__()

        monkeypatch.setattr(trainer, "prefetch", Feed)

    return use
