"""Schemes of tags: how a tag a word says where names of things begin and end, and of what type they are.

A tag is a position and a type (``B-PER``, or ``PER-B``), a position alone (``B M E S`` of Chinese word segmentation),
or flat, a type alone (``NOUN``, ``person-actor``). What position a letter stands for is the same in all schemes of the
first kinds (IOB, IOB2, IOBES, BILOU, BMES, BMEWO, ...), so that any set of them reads in one way.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

POSITIONS = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S", "W": "S"}
"""What a letter stands for: a name's begin, inside and end, and a single word (unit, whole)."""
FORMS = {
    "prefix": re.compile(r"(?P<position>[A-Za-z])[-_](?P<type>.*)"),
    "suffix": re.compile(r"(?P<type>.*)[-_](?P<position>[A-Za-z])"),
    "letter": re.compile(r"(?P<position>[A-Za-z])(?P<type>)"),
}
"""What tags look like that say a position."""


class Scheme(NamedTuple):
    """How a set of tags is written.

    Attributes:
      name: a key of `FORMS`, or "flat".
      form: of a tag that says a position; None of flat ones.
    """

    name: str
    form: re.Pattern[str] | None

    def read(self, tag: str) -> tuple[str, str] | None:
        """Position (one of B, I, E, S) and type of a tag that says a position, else None."""
        match = self.form.fullmatch(tag) if self.form else None
        position = POSITIONS.get(match["position"].upper()) if match else None
        return (position, match["type"]) if match and position else None

    def standard(self, tags: Sequence[str]) -> list[str]:
        """A sentence's tags as IOBES, which seqeval reads; of flat ones every run of a tag but ``O`` is one name.

        >>> scheme_of(["B-PER", "L-PER", "U-LOC", "O"]).standard(["B-PER", "L-PER", "U-LOC", "O"])
        ['B-PER', 'E-PER', 'S-LOC', 'O']
        >>> scheme_of(["PER-B", "PER-I", "O"]).standard(["O", "PER-B", "PER-I"])
        ['O', 'B-PER', 'I-PER']
        >>> scheme_of(["NOUN", "VERB"]).standard(["NOUN", "NOUN", "VERB"])
        ['B-NOUN', 'I-NOUN', 'B-VERB']
        """
        if self.form is None:
            before = ["O", *tags]
            return [
                t if t == "O" else f"{'I' if t == last else 'B'}-{t}" for last, t in zip(before, tags, strict=False)
            ]
        return ["O" if read is None else f"{read[0]}-{read[1] or 'word'}" for read in map(self.read, tags)]

    def strangers(self, tags: Iterable[str]) -> list[str]:
        """Tags, other than ``O``, that say no position though others do."""
        if self.form is None:
            return []
        return [tag for tag in tags if tag not in ("O", "o") and self.read(tag) is None]


FLAT = Scheme("flat", None)
"""Of tags that are types."""


def scheme_of(names: Collection[str]) -> Scheme:
    """The scheme of the tags with these names.

    >>> scheme_of(["O", "U-PER"]).name, scheme_of(["B", "M", "E", "S"]).name, scheme_of(["person-actor", "O"]).name
    ('prefix', 'letter', 'flat')
    """
    tags = [name for name in names if name not in ("O", "o")]
    prefix, suffix, letter = (Scheme(name, form) for name, form in FORMS.items())
    # a B- or I- is unmistakable; what else reads like a position (E-mail, S-Bahn) is one where every tag does
    if any(tag[:2] in ("B-", "I-", "B_", "I_") for tag in tags) or _all_say(prefix, tags):
        return prefix
    by_type: dict[str, set[str]] = {}
    for position, type_ in filter(None, map(suffix.read, tags)):
        by_type.setdefault(type_, set()).add(position)
    if any({"B", "I"} <= positions or {"B", "E"} <= positions for positions in by_type.values()):
        return suffix
    if _all_say(suffix, tags):
        return suffix
    return letter if "B" in map(str.upper, tags) and _all_say(letter, tags) else FLAT


def _all_say(scheme: Scheme, tags: Collection[str]) -> bool:
    """Whether all tags say a position, and not all the end of a name."""
    read = [scheme.read(tag) for tag in tags]
    return all(read) and any(parts is not None and parts[0] != "E" for parts in read)
