"""Every method, loss and surgery by the name that a config uses. One line enrols a new one."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jaxlm.core import LM, NO_DATA, Method, NoData, SurgeryContext, call, lookup
from jaxlm.methods.bake import bake
from jaxlm.methods.distill.method import distill
from jaxlm.methods.factorize.svd import activation_svd, svd
from jaxlm.methods.peft.lora import lora
from jaxlm.methods.prune.structured.depth import drop_layers, keep_layers
from jaxlm.methods.prune.structured.gates import prune, structured
from jaxlm.methods.prune.structured.l0 import l0
from jaxlm.methods.prune.unstructured.magnitude import magnitude, prune_magnitude
from jaxlm.methods.prune.unstructured.movement import movement
from jaxlm.methods.prune.unstructured.regrow import regrow
from jaxlm.methods.prune.unstructured.sparsegpt import sparsegpt
from jaxlm.methods.prune.unstructured.taylor import taylor
from jaxlm.methods.prune.unstructured.wanda import wanda
from jaxlm.methods.prune.vocabulary import trim_vocabulary
from jaxlm.methods.quantize.awq import awq
from jaxlm.methods.quantize.gptq import gptq
from jaxlm.methods.quantize.mixed_precision import mixed_precision, mixed_precision_weights
from jaxlm.methods.quantize.qat import lsq, pact, qat
from jaxlm.methods.quantize.round_to_nearest import quantize
from jaxlm.methods.quantize.smoothquant import smoothquant
from jaxlm.methods.quantize.static import quantize_static
from jaxlm.methods.share.clustering import cluster
from jaxlm.methods.share.layers import share, unshare

METHODS: dict[str, Callable[..., Method]] = {
    "l0": l0,
    "lora": lora,
    "lsq": lsq,
    "magnitude": magnitude,
    "movement": movement,
    "pact": pact,
    "qat": qat,
    "regrow": regrow,
    "structured": structured,
    "taylor": taylor,
}
LOSSES: dict[str, Callable[..., Method]] = {"distill": distill}
SURGERY: dict[str, Callable[..., LM]] = {
    "activation_svd": activation_svd,
    "awq": awq,
    "bake": bake,
    "cluster": cluster,
    "drop_layers": drop_layers,
    "gptq": gptq,
    "keep_layers": keep_layers,
    "magnitude": prune_magnitude,
    "mixed_precision": mixed_precision,
    "mixed_precision_weights": mixed_precision_weights,
    "prune": prune,
    "quantize": quantize,
    "quantize_static": quantize_static,
    "share": share,
    "smoothquant": smoothquant,
    "sparsegpt": sparsegpt,
    "svd": svd,
    "trim_vocabulary": trim_vocabulary,
    "unshare": unshare,
    "wanda": wanda,
}


def make(table: Mapping[str, Callable[..., Any]], entry: Mapping[str, Any], section: str, *given: Any) -> Any:
    """What the function of an entry `{"name": …, **options}` of a config gives; errors name the nearest valid word.

    Args:
      section: of the config, for messages.
      given: the arguments that every function of the table takes before its options.
    """
    if "name" not in entry:
        raise ValueError(f"an entry of config.{section} needs a name; known: {', '.join(sorted(table))}")
    options = {key: value for key, value in entry.items() if key != "name"}
    function = lookup(table, entry["name"], f"entry of config.{section}")
    return call(function, options, f"config.{section}: {entry['name']}", *given)


def method(entry: Mapping[str, Any]) -> tuple[str, Method]:
    """A named Method of `config.methods`."""
    return entry["name"], make(METHODS, entry, "methods")


Model = TypeVar("Model", bound=LM)


def operate(entry: Mapping[str, Any], lm: Model, context: SurgeryContext = NO_DATA) -> Model:
    """The model after one entry of `config.surgery`."""
    try:
        return make(SURGERY, entry, "surgery", lm, context)
    except NoData as error:
        raise NoData(f"config.surgery: {entry['name']}: {error}") from None
