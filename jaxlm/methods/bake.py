"""Surgery that leaves plain arrays."""

from jaxlm.core import LM, NO_DATA, SurgeryContext, Weight, map_leaves, materialize


def bake(lm: LM, context: SurgeryContext = NO_DATA) -> LM:
    """Replaces every Weight by the dense matrix that it stands for; baking twice changes nothing.

    Source: none; it writes out what Weights stand for.

    When: the zeros of masks need not survive further training, or transformers should read the model.
    """
    dense = map_leaves(lambda _, leaf: materialize(leaf) if isinstance(leaf, Weight) else leaf, lm.params)
    return lm.replace(params=dense)
