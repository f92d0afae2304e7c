"""Every class that may sit in a parameter tree, by the name that model directories store.

A class lives beside its method and is imported when a directory names it: so loading knows all methods and imports
none. One line enrols a new class; it is then held to the contracts of its socket.
"""

import importlib
from collections.abc import Mapping

from jaxlm.core.lookup import lookup
from jaxlm.core.weight import Node

NODES: Mapping[str, str] = {
    "Clustered": "jaxlm.methods.share.clustered:Clustered",
    "Constraint": "jaxlm.methods.prune.structured.hard_concrete:Constraint",
    "Factored": "jaxlm.core.weights.factored:Factored",
    "FakeQuant": "jaxlm.core.weights.fake_quant:FakeQuant",
    "Gate": "jaxlm.core.site:Gate",
    "HardConcrete": "jaxlm.methods.prune.structured.hard_concrete:HardConcrete",
    "InputScaled": "jaxlm.core.weights.input_scaled:InputScaled",
    "LSQ": "jaxlm.methods.quantize.learned:LSQ",
    "LowRank": "jaxlm.methods.peft.low_rank:LowRank",
    "Masked": "jaxlm.core.weights.masked:Masked",
    "PACT": "jaxlm.methods.quantize.learned:PACT",
    "Quantized": "jaxlm.core.weights.quantized:Quantized",
    "Scored": "jaxlm.methods.prune.unstructured.scored:Scored",
}
"""`name -> "module:class"`."""


def node_class(name: str) -> type[Node]:
    """The class of a name; no other module than those of `NODES` is ever imported for one.

    >>> node_class("Gate").__name__
    'Gate'

    Raises:
      ValueError: for a name that is not listed; the message names the nearest.
    """
    module, _, cls = lookup(NODES, name, "type").partition(":")
    return getattr(importlib.import_module(module), cls)
