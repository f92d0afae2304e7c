"""jaxlm: language models made smaller, faster and cheaper, with pure functions over parameter trees."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlm.io.lm import LM
    from jaxlm.io.pretrained import load, save
    from jaxlm.runner.api import compare, run_stage

__all__ = ["LM", "compare", "load", "run_stage", "save"]

# A table and not imports: `import jaxlm` is quick, and who loads a model does not import what trains one.
_MODULES = {
    "LM": "jaxlm.io.lm",
    "compare": "jaxlm.runner.api",
    "load": "jaxlm.io.pretrained",
    "run_stage": "jaxlm.runner.api",
    "save": "jaxlm.io.pretrained",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
