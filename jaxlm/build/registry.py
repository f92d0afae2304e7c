"""Every method, loss and surgery by the name that a config uses. One line enrols a new one."""

from collections.abc import Mapping
from typing import Any

from jaxlm.compress.bake import bake
from jaxlm.compress.cluster import cluster
from jaxlm.compress.magnitude import magnitude, prune_magnitude
from jaxlm.compress.movement import movement
from jaxlm.compress.quantize import qat, quantize
from jaxlm.compress.regrow import regrow
from jaxlm.compress.share import share, unshare
from jaxlm.compress.structured import keep_layers, prune, structured
from jaxlm.compress.taylor import taylor
from jaxlm.core import Method, call, lookup
from jaxlm.losses.distillation import distill
from jaxlm.peft.lora import lora

METHODS = {
    "lora": lora,
    "magnitude": magnitude,
    "movement": movement,
    "qat": qat,
    "regrow": regrow,
    "structured": structured,
    "taylor": taylor,
}
LOSSES = {"distill": distill}
SURGERY = {
    "bake": bake,
    "cluster": cluster,
    "keep_layers": keep_layers,
    "magnitude": prune_magnitude,
    "prune": prune,
    "quantize": quantize,
    "share": share,
    "unshare": unshare,
}


def make(table: Mapping[str, Any], entry: Mapping[str, Any], what: str, **given: Any) -> Any:
    """`{"name": …, **arguments}` from a config, looked up and called; errors name the nearest valid word."""
    if "name" not in entry:
        raise ValueError(f"an entry of config.{what} needs a name; known: {', '.join(sorted(table))}")
    arguments = {key: value for key, value in entry.items() if key != "name"}
    function = lookup(table, entry["name"], f"entry of config.{what}")
    return call(function, arguments, f"config.{what}: {entry['name']}", **given)


def method(entry: Mapping[str, Any]) -> tuple[str, Method]:
    """A named Method of `config.methods`."""
    return entry["name"], make(METHODS, entry, "methods")
