"""What the contract tests train and compare: small random models, a batch, a teacher."""

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from fast_to_compile import QUICK

from jaxlm.core import Tree, map_leaves
from jaxlm.io.lm import LM
from jaxlm.methods.distill.teacher import DistillConfig, Teacher
from jaxlm.models.config import ModelConfig
from jaxlm.models.network import Network

quick = functools.partial(jax.jit, compiler_options=QUICK)


def noisy(config: ModelConfig, seed: int = 0, scale: float = 0.1) -> LM:
    """A model whose biases and norms are random too."""

    def with_noise(path: str, leaf: jax.Array) -> jax.Array:
        return leaf + scale * jax.random.normal(jax.random.key(zlib.crc32(path.encode())), leaf.shape)

    lm = LM.initialize(config, jax.random.key(seed))
    return lm.replace(params=map_leaves(with_noise, lm.params))


def ragged_batch() -> dict[str, np.ndarray]:
    """Rows of unequal length, and labels of unequal number: the two microbatches differ in weight."""
    rng = np.random.default_rng(0)
    mask = (np.arange(6) < np.array([[6], [2], [5], [3]])).astype(np.int32)
    ids = rng.integers(1, 19, (4, 6)).astype(np.int32) * mask
    labels = np.where(mask & (rng.random((4, 6)) < 0.8), rng.integers(0, 19, (4, 6)), -100).astype(np.int32)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


BATCH = ragged_batch()


@functools.cache
def _forward(network: Network) -> Any:
    return quick(network.forward)


def logits(network: Network, params: Tree) -> np.ndarray:
    """Those of the tokens of `BATCH`, float32 `[tokens, vocab]`; parameters in either view."""
    batch = {name: value for name, value in BATCH.items() if name != "labels"}
    return np.asarray(_forward(network)(params, batch)["logits"])[BATCH["attention_mask"] > 0]


class OnlyTeacher:
    """The teachers of a run, all of which are this model."""

    def __init__(self, lm: LM):
        network = lm.network

        def forward(params: Tree, batch: Mapping[str, jax.Array], taps: Any) -> dict[str, Any]:
            return network.forward(params, batch, taps=taps)

        self._teacher = Teacher(forward, network.run_view(lm.params), lm.config.num_layers, lm.config.hidden_size)

    def teacher(self, directory: str | None, cache: Mapping[str, Any] | None, temperature: float) -> Teacher:
        """This model."""
        return self._teacher

    def placed(self, config: DistillConfig) -> DistillConfig:
        """The same: its parameters are where they are needed."""
        return config
