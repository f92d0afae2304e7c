"""Surgery that leaves plain arrays."""

from typing import Any

from jaxlm.core import Axes, Tree, Weight, map_leaves, materialize


def bake(model: Any, params: Tree, axes: dict[str, Axes]):
    """Replaces every Weight by the dense matrix that it stands for; baking twice changes nothing."""
    return model, map_leaves(lambda _, leaf: materialize(leaf) if isinstance(leaf, Weight) else leaf, params), axes
