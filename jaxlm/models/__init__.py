"""One network, and the families that are configurations of it."""

from typing import Any

from jaxlm.core import call, lookup
from jaxlm.models.bert import BERT, ROBERTA
from jaxlm.models.config import ModelConfig
from jaxlm.models.family import Family
from jaxlm.models.gpt2 import GPT2
from jaxlm.models.heads import HEADS, Head
from jaxlm.models.llama import LLAMA, MISTRAL, QWEN2
from jaxlm.models.t5 import T5

FAMILIES: dict[str, Family] = {f.name: f for f in (GPT2, BERT, ROBERTA, LLAMA, MISTRAL, QWEN2, T5)}


def heads_of(family: Family) -> dict[str, Head]:
    """The heads that a model of a family can be given: those of its classes in transformers, and those of no class.

    >>> list(heads_of(T5))
    ['seq2seq', 'none']
    """
    theirs = {fields["head"] for other in FAMILIES.values() for fields in other.architectures.values()}
    ours = {fields["head"] for fields in family.architectures.values()} | {"none"}
    return {name: head for name, head in HEADS.items() if name in ours or name not in theirs}


def model_config(family: str, **fields: Any) -> ModelConfig:
    """A ModelConfig of a family: its defaults, overlaid with `fields`.

    Raises:
      ValueError: for an unknown family or field, naming the nearest, or for sizes that do not fit.

    >>> model_config("gpt2", vocab_size=256, num_layers=2).activation
    'gelu_tanh'
    """
    chosen: Family = lookup(FAMILIES, family, "model family")
    values = {**chosen.defaults, **fields}
    values |= {name: rule(values) for name, rule in chosen.derived.items() if name not in fields}
    return call(ModelConfig, values, f"the model {family!r}", family=family)
