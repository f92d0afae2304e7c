"""One network, and the families that are configurations of it."""

from typing import Any

from jaxlm.core import call, lookup
from jaxlm.models.config import ModelConfig
from jaxlm.models.family import Family
from jaxlm.models.gpt2 import GPT2

FAMILIES: dict[str, Family] = {family.name: family for family in (GPT2,)}


def model_config(family: str, **fields: Any) -> ModelConfig:
    """A ModelConfig of a family: its defaults, overlaid with `fields`.

    Raises:
      ValueError: for an unknown family or field, naming the nearest, or for sizes that do not fit.

    >>> model_config("gpt2", vocab_size=256, num_layers=2).activation
    'gelu_tanh'
    """
    defaults = lookup(FAMILIES, family, "model family").defaults
    return call(ModelConfig, {**defaults, **fields}, f"the model {family!r}", family=family)
