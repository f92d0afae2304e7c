"""Paths and rules: the one engine behind freezing, decay, learning rates, method targets and mesh placement.

A parameter tree is a nested dict whose leaves are arrays or Nodes (Weights, Sites). A leaf's *path* joins the keys with
`/`: `layers_0/attention/query/kernel`. The arrays inside a Node have *names*, the path plus a dotted field:
`layers_0/attention/query/kernel.base.codes`. Checkpoints and model directories are flat dicts by name.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxlm.core.weight import Axes, Node, components

Tree = Mapping[str, Any]
Rules = Sequence[tuple[str, Any]]
SEGMENT = r"layers_(\d+)-\d+"
"""Key of several consecutive layers stacked in the run view: `layers_0-11`."""


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """`{path: leaf}`, Nodes kept whole, in the order of the tree.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a/b': 1, 'c': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`.

    >>> unflatten({"a/b": 1, "c": 2})
    {'a': {'b': 1}, 'c': 2}
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def map_leaves(function: Callable[[str, Any], Any], tree: Tree) -> dict[str, Any]:
    """`function(path, leaf)` at every leaf, Nodes passed whole."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


class ArrayInfo(NamedTuple):
    """One array of a parameter tree: its name and path, its role (see `Component`) and its axis names."""

    name: str
    path: str
    role: str
    axes: Axes | None


def arrays(tree: Tree) -> dict[str, Any]:
    """`{name: array}` for every array, those inside Nodes included."""
    by_name: dict[str, Any] = {}
    for path, leaf in flatten(tree).items():
        if isinstance(leaf, Node):
            by_name |= {join_field(path, field): field_of(leaf, field) for field in components(leaf, (None, None))}
        else:
            by_name[path] = leaf
    return by_name


def describe(tree: Tree, axes: Mapping[str, Axes] | None = None) -> dict[str, ArrayInfo]:
    """`{name: ArrayInfo}` in the order of `arrays`.

    Args:
      tree: parameters in the canonical or the run view. In the run view an array may be a stack of several
        layers; its `path` is that of the first of them, and its axes begin with `layers`.
      axes: axis names by canonical path; a path without names raises KeyError. `None` leaves them out.
    """
    infos: dict[str, ArrayInfo] = {}
    for run_path, leaf in flatten(tree).items():
        path = canonical_path(run_path)
        if axes is not None and path not in axes:
            raise KeyError(f"parameter {path!r} has no axis names; whoever adds a leaf must name its axes")
        stack = ("layers",) if path != run_path else ()
        for field, part in components(leaf, (None, None) if axes is None else axes[path]).items():
            name = join_field(run_path, field)
            infos[name] = ArrayInfo(name, path, part.role, None if axes is None else stack + part.axes)
    return infos


def canonical_path(run_path: str) -> str:
    """Path in the canonical view of a leaf of the run view: of the first layer, where it is a stack of several.

    >>> canonical_path("layers_0-11/mlp/up/kernel")
    'layers_0/mlp/up/kernel'
    """
    return re.sub(SEGMENT, r"layers_\1", run_path)


def is_stacked(run_path: str) -> bool:
    """Whether a leaf or array of the run view is a stack of several layers, along a leading dimension.

    Its number of dimensions would not tell: a convolution has three, and so has a matrix an expert.

    >>> is_stacked("decoder/layers_0-11/mlp/up/kernel.base"), is_stacked("layers_0/mlp/experts/kernel")
    (True, False)
    """
    return any(re.fullmatch(SEGMENT, key) for key in run_path.split("/"))


def with_arrays(tree: Tree, values: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with every array replaced by `values[name]`; the names must agree."""
    names = arrays(tree).keys()
    missing, extra = names - values.keys(), values.keys() - names
    if missing or extra:
        raise KeyError(f"arrays do not fit the tree: missing {sorted(missing)[:5]}, unexpected {sorted(extra)[:5]}")
    return map_leaves(lambda path, leaf: _rebuild(leaf, path, values), tree)


def _rebuild(leaf: Any, path: str, values: Mapping[str, Any]) -> Any:
    if not isinstance(leaf, Node):
        return values[path]
    for field in components(leaf, (None, None)):
        leaf = replace_field(leaf, field, values[join_field(path, field)])
    return leaf


def join_field(path: str, field: str) -> str:
    """Name of an array: its path, and the field inside a Node if there is one."""
    return f"{path}.{field}" if field else path


def field_of(leaf: Any, field: str) -> Any:
    """The array behind a dotted field path (`""` is the leaf itself)."""
    for part in field.split(".") if field else ():
        leaf = getattr(leaf, part)
    return leaf


def replace_field(leaf: Any, field: str, value: Any) -> Any:
    """`leaf` with the array behind a dotted field path replaced."""
    head, _, rest = field.partition(".")
    return leaf.replace(**{head: replace_field(getattr(leaf, head), rest, value) if rest else value})


def matches(pattern: str, path: str, role: str = "base") -> bool:
    """Whether a rule's pattern (a regex for the whole path, with an optional `#role`) names this array.

    >>> matches(r".*/kernel", "layers_0/mlp/up/kernel", "factor")
    True
    >>> matches(r".*/kernel#base", "layers_0/mlp/up/kernel", "factor")
    False
    """
    return re.fullmatch(pattern, f"{path}#{role}" if "#" in pattern else path) is not None


def first_match(rules: Rules, path: str, role: str = "base", default: Any = None) -> Any:
    """Value of the first rule that matches, or `default`."""
    return next((value for pattern, value in rules if matches(pattern, path, role)), default)


def check_rules(rules: Rules, infos: Iterable[ArrayInfo], what: str) -> None:
    """Raises ValueError for a rule that matches no array: a typing error that would otherwise do nothing, silently."""
    infos = list(infos)
    for pattern, _ in rules:
        if not any(matches(pattern, info.path, info.role) for info in infos):
            near = difflib.get_close_matches(pattern, [info.path for info in infos], n=3, cutoff=0.0)
            raise ValueError(f"{what}: the rule {pattern!r} matches no parameter; paths look like {near}")


def sizes(tree: Tree) -> int:
    """Number of array entries below a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
