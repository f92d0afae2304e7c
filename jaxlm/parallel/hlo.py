"""Parsing of compiled programs: which collectives they run, how often, and how many bytes these move."""

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
    """A result of an operation: its dtype as HLO writes it (`bf16`, `s32`) and its shape."""

    dtype: str
    shape: tuple[int, ...]


class Collective(NamedTuple):
    """One collective operation of a program, per chip.

    Attributes:
      kind: `all-gather`, `reduce-scatter`, `all-reduce`, `all-to-all` or `collective-permute`.
      results: its results (and its operands, for an asynchronous start).
      bytes: size of its results in one execution; of its operands for a reduce-scatter, whose results are smaller.
      times: executions in one run of the program; a loop whose trip count is unknown counts once.
      in_loop: whether it runs inside a loop.
      source: the operation that the compiler made it from (`op_name`).
    """

    kind: str
    results: tuple[Result, ...]
    bytes: int
    times: int
    in_loop: bool
    source: str


class Traffic(NamedTuple):
    """Totals of one kind of collective: operations in the program and in its loops, executions and bytes per run."""

    operations: int
    in_loops: int
    times: int
    bytes: int


def collectives(hlo_text: str) -> list[Collective]:
    """Every collective of an optimized program (`compiled.as_text()`).

    An asynchronous pair counts once, at its start. A collective that the TPU compiler spreads over several fusions, to
    overlap it with products, counts once, where it begins. On TPUs a reduce-scatter is a fusion around an all-reduce;
    it is reported as a reduce-scatter.
    """
    entry, computations = parse(hlo_text)
    executions = _executions(entry, computations)
    unique: dict[str, Collective] = {}
    for name, body in computations.items():
        if name not in executions:
            continue
        types = {instruction.name: instruction.type for instruction in body}
        for instruction in body:
            match = _COLLECTIVE.fullmatch(instruction.opcode)
            if match is None:
                continue
            # The bytes that it moves.
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else match[1]
            operands = sum(_size(types.get(operand, "")) for operand in instruction.operands)
            moved = _size(instruction.type)
            if instruction.opcode == "all-gather-start":
                moved -= operands  # the type of this start is (operands, results)
            elif instruction.opcode != kind or kind == "reduce-scatter":
                moved = max(moved, operands) if name.startswith("all-reduce-scatter") else operands
            # One entry per operation; of the parts of one that is spread over fusions, that which runs least often.
            results = tuple(Result(dtype, _dims(dims)) for dtype, dims in _ARRAY.findall(instruction.type))
            source = re.search(r'op_name="([^"]*)"', instruction.attributes)
            collective = Collective(kind, results, moved, *executions[name], source[1] if source else "")
            key = _chain_key(instruction) or f"{name}/{instruction.name}"
            if key not in unique or collective.times < unique[key].times:
                unique[key] = collective
    return list(unique.values())


def traffic(operations: Iterable[Collective]) -> dict[str, Traffic]:
    """Totals by kind; kinds that do not occur are left out."""
    by_kind: dict[str, list[Collective]] = {kind: [] for kind in KINDS}
    for operation in operations:
        by_kind[operation.kind].append(operation)
    return {kind: _total(same_kind) for kind, same_kind in by_kind.items() if same_kind}


def _total(operations: list[Collective]) -> Traffic:
    return Traffic(
        operations=len(operations),
        in_loops=sum(c.in_loop for c in operations),
        times=sum(c.times for c in operations),
        bytes=sum(c.times * c.bytes for c in operations),
    )


def _chain_key(instruction: Instruction) -> str | None:
    """A key that the parts of a collective spread over several fusions have in common, `None` for any other."""
    chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
    return f"chain {chain[1]} {channel[1]}" if chain and channel else None


def parse(hlo_text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """`(name of the entry, {computation: instructions})`.

    Raises:
      ValueError: for a text without entry computation.
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


def _executions(entry: str, computations: Mapping[str, list[Instruction]]) -> dict[str, tuple[int, bool]]:
    """`{computation: (executions in one run, whether inside a loop)}` of everything that the entry reaches."""
    executions: dict[str, tuple[int, bool]] = {entry: (1, False)}
    for name in reversed(_callees_first(entry, computations)):
        times, in_loop = executions[name]
        definitions = {instruction.name: instruction for instruction in computations[name]}
        for instruction in computations[name]:
            loop = instruction.opcode == "while"
            trips = (trip_count(instruction, definitions, computations) or 1) if loop else 1
            for _, callee in _calls(instruction):
                times_before, in_loop_before = executions.get(callee, (0, True))
                executions[callee] = (times_before + times * trips, in_loop_before and (in_loop or loop))
    return executions


def _callees_first(entry: str, computations: Mapping[str, list[Instruction]]) -> list[str]:
    """Names of the computations that the entry reaches, callees before their callers."""
    order: list[str] = []
    visited: set[str] = set()

    def visit(name: str) -> None:
        if name in visited or name not in computations:
            return
        visited.add(name)
        for instruction in computations[name]:
            for _, callee in _calls(instruction):
                visit(callee)
        order.append(name)

    visit(entry)
    return order


def _calls(instruction: Instruction) -> Iterable[tuple[str, str]]:
    for role, several, one in _CALLED.findall(instruction.attributes):
        for name in (one or several).split(","):
            yield role, name.strip().lstrip("%")


def trip_count(
    loop: Instruction, definitions: Mapping[str, Instruction], computations: Mapping[str, list[Instruction]]
) -> int | None:
    """Iterations of a while loop, or `None` if they are unknown.

    Read from `known_trip_count` if the compiler left it, else from a condition `counter < constant` of a counter that
    steps by one, as that of a scan does; a start that is not a constant is taken to be 0.
    """
    annotation = re.search(r'known_trip_count[^\d}]*?"?n"?\D*?(\d+)', loop.attributes)
    if annotation:
        return int(annotation[1])
    name = next((callee for role, callee in _calls(loop) if role == "condition"), "")
    condition = {instruction.name: instruction for instruction in computations.get(name, ())}
    compare = next((i for i in condition.values() if i.opcode == "compare" and "direction=LT" in i.attributes), None)
    if compare is None or not all(operand in condition for operand in compare.operands):
        return None
    counter, limit = (condition[operand] for operand in compare.operands)
    index = re.search(r"index=(\d+)", counter.attributes)
    if limit.opcode != "constant" or not limit.arguments.isdecimal() or index is None:
        return None
    start = definitions.get(loop.operands[0])
    if start is not None and start.opcode == "tuple":
        start = definitions.get(start.operands[int(index[1])])
    first = int(start.arguments) if start is not None and start.opcode == "constant" else 0
    return int(limit.arguments) - first
