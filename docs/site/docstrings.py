"""The docstrings of jaxlm as data: what the pages of the site are made of, and what tests hold to be complete.

A section (`Args:`, `Attributes:`) names several things in one line where they belong together, as in
`begin, end: …; every: …`. Here each name has its own meaning.
"""

import inspect
import re
from collections.abc import Collection
from typing import Any, NamedTuple

INDENT = "  "
SECTIONS = ("Args", "Attributes", "Returns", "Raises")


class Description(NamedTuple):
    """The parts of a method's docstring.

    Attributes:
      what: what it does, with its mathematics.
      when: when to use it.
      source: the papers.
      options: meaning of every argument that the docstring explains, by its name.
    """

    what: str
    when: str
    source: str
    options: dict[str, str]


def describe(function: Any) -> Description:
    """The parts of the docstring of a method, a loss or a surgery."""
    text = inspect.getdoc(function) or ""
    prose = re.split(rf"^(?:{'|'.join(SECTIONS)}):$", text, maxsplit=1, flags=re.M)[0]
    prose, when = taken(prose, r"^When: ")
    prose, source = taken(prose, r"\bSources?:\s")
    what = prose.strip().removeprefix("Surgery: ")
    options = meanings(section(text, "Args"), inspect.signature(function).parameters.keys())
    return Description(capitalized(what), capitalized(when), capitalized(source), options)


def taken(text: str, begins: str) -> tuple[str, str]:
    """The text without what begins so and ends with its paragraph, and that.

    >>> taken("It trains. Source: A 2020.\\n\\nMore.", r"Source: ")
    ('It trains.\\n\\nMore.', 'A 2020.')
    """
    match = re.search(rf"\s*{begins}(.*?)(?=\n\n|\Z)", text, flags=re.S | re.M)
    if match is None:
        return text, ""
    return text[: match.start()] + text[match.end() :], joined(match[1])


def section(text: str, name: str) -> list[str]:
    """The lines of a section of a docstring, in which `name:` opens an entry and deeper lines continue it."""
    lines = text.splitlines()
    if f"{name}:" not in lines:
        return []
    body = lines[lines.index(f"{name}:") + 1 :]
    end = next((i for i, line in enumerate(body) if line and not line.startswith(INDENT)), len(body))
    return [line.removeprefix(INDENT) for line in body[:end] if line.strip()]


def meanings(lines: list[str], names: Collection[str]) -> dict[str, str]:
    """The meaning of every name, a sentence with its full stop, from the entries of a section.

    >>> meanings(["begin, end: first and last step; every: steps", "  between two."], ["begin", "end", "every"])
    {'begin': 'first and last step.', 'end': 'first and last step.', 'every': 'steps between two.'}

    Args:
      names: that may be explained; other words before a colon are prose.
    """
    entries: list[str] = []
    for line in lines:
        if line.startswith(" ") and entries:
            entries[-1] += f" {line.strip()}"
        else:
            entries.append(line)
    name = f"(?:{'|'.join(map(re.escape, names))})" if names else "(?!)"
    opening = re.compile(rf"(?:^|(?<=[;.] ))({name}(?:, {name})*): ")
    by_name: dict[str, str] = {}
    for entry in entries:
        parts = opening.split(entry)
        for opened, text in zip(parts[1::2], parts[2::2], strict=True):
            by_name |= dict.fromkeys(opened.split(", "), text.strip().rstrip(";.") + ".")
    return by_name


def joined(text: str) -> str:
    """A paragraph in one line."""
    return " ".join(text.split())


def capitalized(text: str) -> str:
    """With a capital, where it begins with a word."""
    return text[:1].upper() + text[1:]
