"""jaxlm: language models made smaller, faster and cheaper, with pure functions over parameter trees."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlm.io.lm import LM
    from jaxlm.io.pretrained import load, save

__all__ = ["LM", "load", "save"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
    from jaxlm.io import pretrained

    return getattr(pretrained, name)
