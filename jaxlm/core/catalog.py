"""The catalog: what configs and model directories may name, and where each of it is written.

A Node class lives beside its method, and every folder of methods has a table of its names: METHODS, LOSSES and SURGERY,
each a dict of `Entry`. The tables hold no functions but where to import them from, so loading a model knows all classes
and imports those that it meets.
"""

import functools
import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxlm.core.lookup import lookup
from jaxlm.core.weight import Node

TABLES = (
    "jaxlm.methods:SURGERY",
    "jaxlm.methods.distill:LOSSES",
    "jaxlm.methods.factorize:SURGERY",
    "jaxlm.methods.peft:METHODS",
    "jaxlm.methods.prune:METHODS",
    "jaxlm.methods.prune:SURGERY",
    "jaxlm.methods.quantize:METHODS",
    "jaxlm.methods.quantize:SURGERY",
    "jaxlm.methods.share:SURGERY",
)
"""Every table, `"folder:table"`."""

NODES: Mapping[str, str] = {
    "Factored": "jaxlm.core.weights.factored:Factored",
    "FakeQuant": "jaxlm.core.weights.fake_quant:FakeQuant",
    "Gate": "jaxlm.core.site:Gate",
    "InputScaled": "jaxlm.core.weights.input_scaled:InputScaled",
    "Masked": "jaxlm.core.weights.masked:Masked",
    "Quantized": "jaxlm.core.weights.quantized:Quantized",
}
"""`name -> "module:Class"` of the classes that several kinds of methods know."""


class Entry(NamedTuple):
    """One line of a table.

    Attributes:
      function: `"module:function"` of what the name stands for, the module's name relative to the folder.
      nodes: `"module:Class"` of each Weight and Site that comes with it; model directories store the class's name.
    """

    function: str
    nodes: tuple[str, ...] = ()


def entries(table: str) -> dict[str, Entry]:
    """The entries of all folders' tables of one name, with absolute names of modules.

    >>> entries("METHODS")["lora"]
    Entry(function='jaxlm.methods.peft.lora:lora', nodes=('jaxlm.methods.peft.low_rank:LowRank',))

    Raises:
      ValueError: for a name that two folders have.
    """
    joined: dict[str, Entry] = {}
    for place in (place for place in TABLES if place.endswith(f":{table}")):
        folder, added = place.partition(":")[0], imported(place)
        if twice := joined.keys() & added.keys():
            raise ValueError(f"{table} of {folder}: {', '.join(sorted(twice))} is the name of something else already")
        for name, entry in added.items():
            joined[name] = Entry(f"{folder}.{entry.function}", tuple(f"{folder}.{node}" for node in entry.nodes))
    return joined


@functools.cache
def nodes() -> dict[str, str]:
    """`name -> "module:Class"` of every class that may sit in the parameter tree of a model directory."""
    listed = [entry for table in ("METHODS", "LOSSES", "SURGERY") for entry in entries(table).values()]
    return {**NODES, **{place.partition(":")[2]: place for entry in listed for place in entry.nodes}}


def node_class(name: str) -> type[Node]:
    """The class of a name; no module but the listed ones is ever imported for one.

    >>> node_class("LowRank").__module__
    'jaxlm.methods.peft.low_rank'

    Raises:
      ValueError: for a name that is not listed; the message names the nearest.
    """
    return imported(lookup(nodes(), name, "type"))


def imported(place: str) -> Any:
    """What a `"module:name"` of a table stands for."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
