"""Every method, loss and surgery by the name that a config uses, from the tables of the folders of methods."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jaxlm.core import LM, NO_DATA, Method, NoData, SurgeryContext, call, entries, imported, lookup


def functions(table: str) -> dict[str, Callable[..., Any]]:
    """`name -> function` of the folders' tables of one name."""
    return {name: imported(entry.function) for name, entry in sorted(entries(table).items())}


METHODS: dict[str, Callable[..., Method]] = functions("METHODS")
LOSSES: dict[str, Callable[..., Method]] = functions("LOSSES")
SURGERY: dict[str, Callable[..., LM]] = functions("SURGERY")


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
