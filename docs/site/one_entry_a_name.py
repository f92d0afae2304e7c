"""A griffe extension: sections of docstrings with one entry a name, as its parsers expect them."""

import re
from typing import Any

from griffe import Class, Docstring, Extension, Function, Object

from docs.site.docstrings import INDENT, meanings, section


class OneEntryAName(Extension):
    """Rewrites `Args:` of functions and `Attributes:` of classes."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for every object that was loaded."""
        if obj.docstring is None:
            return
        if isinstance(obj, Function):
            obj.docstring.value = rewritten(obj.docstring, "Args", [p.name for p in obj.parameters])
        elif isinstance(obj, Class):
            obj.docstring.value = rewritten(obj.docstring, "Args", [p.name for p in obj.parameters])
            obj.docstring.value = rewritten(obj.docstring, "Attributes", list(obj.members))


def rewritten(docstring: Docstring, name: str, names: list[str]) -> str:
    """The text of a docstring with one of its sections rewritten; names that are not explained are left out."""
    lines = section(docstring.value, name)
    if not lines:
        return docstring.value
    entries = "\n".join(f"{INDENT}{key}: {meaning}" for key, meaning in meanings(lines, names).items())
    body = rf"^{name}:\n(?:{INDENT}.*\n?|\n(?={INDENT}))*"
    return re.sub(body, lambda _: f"{name}:\n{entries}\n" if entries else "", docstring.value, flags=re.M)
