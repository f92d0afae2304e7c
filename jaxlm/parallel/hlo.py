"""Reading a compiled program: which collectives it runs, how often, and how many bytes they move."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]\d+[a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([\w-]+)\(")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|\w+_computations?)=(?:\{([^}]*)\}|%?([\w.-]+))")
_COLLECTIVE = re.compile(rf"({'|'.join(KINDS)})(?:-start)?")


class Instruction(NamedTuple):
    """One line of HLO: `%name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str


class Result(NamedTuple):
    """An array that an operation gives: its dtype as HLO writes it (`bf16`, `s32`) and its shape."""

    dtype: str
    shape: tuple[int, ...]


class Collective(NamedTuple):
    """One collective operation of a program, as one chip sees it.

    Attributes:
      kind: `all-gather`, `reduce-scatter`, `all-reduce`, `all-to-all` or `collective-permute`.
      results: the arrays that it gives (with its operands, if it is an asynchronous start).
      bytes: size of its results in one execution; of its operands for a reduce-scatter, whose results are smaller.
      times: executions in one run of the program; a loop whose trip count is unknown counts once.
      in_loop: whether it runs inside a loop.
      source: the operation it comes from, as the compiler remembers it.
    """

    kind: str
    results: tuple[Result, ...]
    bytes: int
    times: int
    in_loop: bool
    source: str


class Traffic(NamedTuple):
    """Collectives of one kind, added up: operations in the program, in its loops, executions and bytes in one run."""

    operations: int
    in_loops: int
    times: int
    bytes: int


def collectives(hlo_text: str) -> list[Collective]:
    """Every collective of an optimized program (`compiled.as_text()`).

    An asynchronous pair counts once, at its start. A collective that the TPU compiler spreads over several fusions, to
    overlap it with products, counts once, where it begins. A TPU's reduce-scatter is a fusion around an all-reduce, and
    is reported as what it is.
    """
    entry, computations = parse(hlo_text)
    runs = _runs(entry, computations)
    found: dict[str, Collective] = {}
    for name, body in computations.items():
        if name not in runs:
            continue
        types = {instruction.name: instruction.type for instruction in body}
        for instruction in body:
            match = _COLLECTIVE.fullmatch(instruction.opcode)
            if match is None:
                continue
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else match[1]
            operands = sum(_size(types.get(operand, "")) for operand in instruction.operands)
            moved = _size(instruction.type)
            if instruction.opcode == "all-gather-start":
                moved -= operands  # the type of this start is (operands, results)
            elif instruction.opcode != kind or kind == "reduce-scatter":
                moved = max(moved, operands) if name.startswith("all-reduce-scatter") else operands
            results = tuple(Result(dtype, _dims(dims)) for dtype, dims in _ARRAY.findall(instruction.type))
            source = re.search(r'op_name="([^"]*)"', instruction.attributes)
            this = Collective(kind, results, moved, *runs[name], source[1] if source else "")
            key = _spread(instruction) or f"{name}/{instruction.name}"
            if key not in found or this.times < found[key].times:
                found[key] = this
    return list(found.values())


def traffic(found: Iterable[Collective]) -> dict[str, Traffic]:
    """Totals by kind, kinds that do not occur left out."""
    found = list(found)
    return {
        kind: Traffic(
            len(own), sum(c.in_loop for c in own), sum(c.times for c in own), sum(c.times * c.bytes for c in own)
        )
        for kind in KINDS
        if (own := [c for c in found if c.kind == kind])
    }


def _spread(instruction: Instruction) -> str | None:
    """What the parts of a collective that is spread over several fusions have in common."""
    chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
    return f"chain {chain[1]} {channel[1]}" if chain and channel else None


def parse(hlo_text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """`(name of the entry, {computation: instructions})`.

    Raises:
      ValueError: when the text has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", None
    for line in hlo_text.splitlines():
        header = _HEADER.fullmatch(line) if line[:1] not in (" ", "}", "") else None
        if header:
            body = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif body is not None and (match := _INSTRUCTION.match(line)):
            instruction = _instruction(match[1], match[2])
            if instruction is not None:
                body.append(instruction)
    if not entry:
        raise ValueError("this text has no ENTRY computation; give the text of a compiled program, compiled.as_text()")
    return entry, computations


def _instruction(name: str, text: str) -> Instruction | None:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    opcode = _OPCODE.match(text, end)
    if opcode is None:
        return None
    close = _closing(text, opcode.end() - 1)
    arguments = text[opcode.end() : close]
    operands = tuple(re.findall(r"%([\w.-]+)", arguments))
    return Instruction(name, text[:end], opcode[1], operands, arguments, text[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


def _size(type_text: str) -> int:
    """Bytes of the arrays of a type."""
    return sum(
        math.ceil(math.prod(_dims(dims)) * (_BITS.get(dtype) or int(re.findall(r"\d+", dtype)[0])) / 8)
        for dtype, dims in _ARRAY.findall(type_text)
    )


def _runs(entry: str, computations: Mapping[str, list[Instruction]]) -> dict[str, tuple[int, bool]]:
    """`{computation: (executions in one run, whether inside a loop)}` of everything that the entry reaches."""
    runs: dict[str, tuple[int, bool]] = {entry: (1, False)}
    order, seen = [], set()

    def visit(name: str) -> None:
        if name in seen or name not in computations:
            return
        seen.add(name)
        for instruction in computations[name]:
            for _, callee in _calls(instruction):
                visit(callee)
        order.append(name)

    visit(entry)
    for name in reversed(order):  # callers before callees
        times, in_loop = runs[name]
        definitions = {instruction.name: instruction for instruction in computations[name]}
        for instruction in computations[name]:
            loop = instruction.opcode == "while"
            trips = (trip_count(instruction, definitions, computations) or 1) if loop else 1
            for _, callee in _calls(instruction):
                before = runs.get(callee, (0, True))
                runs[callee] = (before[0] + times * trips, before[1] and (in_loop or loop))
    return runs


def _calls(instruction: Instruction) -> Iterable[tuple[str, str]]:
    for role, several, one in _CALLED.findall(instruction.attributes):
        for name in (one or several).split(","):
            yield role, name.strip().lstrip("%")


def trip_count(
    loop: Instruction, definitions: Mapping[str, Instruction], computations: Mapping[str, list[Instruction]]
) -> int | None:
    """How often a while loop runs, or `None`.

    Read from `known_trip_count` where the compiler left it, else from a condition `counter < constant`, for a counter
    that steps by one, as that of a scan does; where the start cannot be seen it is taken to be 0.
    """
    known = re.search(r'known_trip_count[^\d}]*?"?n"?\D*?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition = next((callee for role, callee in _calls(loop) if role == "condition"), "")
    inside = {instruction.name: instruction for instruction in computations.get(condition, ())}
    compare = next((i for i in inside.values() if i.opcode == "compare" and "direction=LT" in i.attributes), None)
    if compare is None or not all(operand in inside for operand in compare.operands):
        return None
    counter, limit = (inside[operand] for operand in compare.operands)
    index = re.search(r"index=(\d+)", counter.attributes)
    if limit.opcode != "constant" or not limit.arguments.isdecimal() or index is None:
        return None
    start = definitions.get(loop.operands[0])
    if start is not None and start.opcode == "tuple":
        start = definitions.get(start.operands[int(index[1])])
    first = int(start.arguments) if start is not None and start.opcode == "constant" else 0
    return int(limit.arguments) - first
