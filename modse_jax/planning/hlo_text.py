"""Parses the text of optimized HLO programs, which XLA writes after compilation.

A program consists of computations (HLO's word for functions): the entry computation, which runs
once, and those that its instructions call, such as the bodies of loops.
"""

import collections
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

ENTRY = "ENTRY"  # the key of a program's entry computation in `Computations`

BYTES_PER_ELEMENT = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "f8e4m3": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
    "c64": 8,
}

# The first line of a computation:
#   ENTRY %main.42 (p: f32[4]) -> f32[4] {
#   %body.1 (t: (s32[], f32[4])) -> (s32[], f32[4]) {
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")

# A loop:
#   %w = (s32[]) while(%t), condition=%cond.1, body=%body.1, backend_config={...}
LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")

# XLA's own knowledge of a loop's trip count, in the loop's backend_config:
#   backend_config={"known_trip_count":{"n":"3"}}
KNOWN_TRIP_COUNT = re.compile(r'known_trip_count":\s*\{"n":\s*"(\d+)"')

# A constant in a loop's condition, and the names in the comparison of a counter with it:
#   %n = s32[]{:T(128)} constant(5)
#   ROOT %lt = pred[] compare(%i, %n), direction=LT
CONSTANT = re.compile(r"\s*%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
NAME = re.compile(r"[\w.\-]+")

# Other instructions that run computations:
#   %f = f32[16] fusion(%q), kind=kCustom, calls=%fused.1
#   %r = f32[8] all-reduce(%p), to_apply=%add
#   %c = f32[8] conditional(%i, %a, %b), true_computation=%t, false_computation=%f
#   %c = f32[8] conditional(%i, %a, %b), branch_computations={%b0, %b1}
CALL = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
CALL_LIST = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")

# To parse a type, layouts, comments and spaces are removed, and the rest is split into tokens:
#   (bf16[8,6]{1,0:T(8,128)(2,1)}, /*index=1*/s32[<=4]{0})   ->   ( bf16[8,6] s32[<=4] )
LAYOUT_OR_COMMENT = re.compile(r"\{[^}]*\}|/\*.*?\*/|\s")
TYPE_TOKEN = re.compile(r"\w+\[[^\]]*\]|[()]")


class UnknownFormatError(Exception):
    """A piece of HLO text has a format that this module does not know. The message says which."""


class Array(NamedTuple):
    """The type of an array, such as bf16[8,6]."""

    type: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.type}[{','.join(map(str, self.shape))}]"

    @property
    def num_bytes(self) -> float:
        """The size of the array. Raises UnknownFormatError for an unknown element type."""
        if self.type not in BYTES_PER_ELEMENT:
            raise UnknownFormatError(f"the size of the type {self.type} of a collective is unknown")
        return BYTES_PER_ELEMENT[self.type] * math.prod(self.shape)


# The type of a value: an array, or a tuple of types.
HloType = Array | list["HloType"]

# {name of a computation: its lines}, in the order of the text.
Computations = dict[str, list[str]]


class Call(NamedTuple):
    """A computation that an instruction runs."""

    callee: str  # name of the computation
    times: int | None  # how often each run of the instruction runs it; None if it depends on data


def split_computations(hlo: str) -> Computations:
    """Divides the text of a program into its computations; returns {name: lines}.

    The entry computation has the name ENTRY. A computation ends where the next one begins, and not
    at a line that is only "}", because the metadata of kernels may contain such lines.
    """
    computations: Computations = {}
    current: list[str] | None = None
    for line in hlo.splitlines():
        head = COMPUTATION.match(line)
        if head:  # such lines are never indented
            current = []
            computations[ENTRY if head.group(1) else head.group(2)] = current
        elif current is not None:
            current.append(line)
    return computations


def count_runs(computations: Computations) -> dict[str, int | None]:
    """Returns {computation: how often it runs in one run of the program}.

    None stands for a number that depends on data. Computations that never run are left out.
    """
    calls = {name: _list_calls(lines, computations) for name, lines in computations.items()}
    runs: dict[str, int | None] = collections.defaultdict(int)
    runs[ENTRY] = 1
    callers_first = reversed(list(_visit_callees_first(calls)))
    for name in callers_first:
        for call in calls.get(name, ()):
            runs[call.callee] = _add(runs[call.callee], _multiply(runs[name], call.times))
    return dict(runs)


def _add(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def _multiply(a: int | None, b: int | None) -> int | None:
    if a == 0 or b == 0:
        return 0
    return None if a is None or b is None else a * b


def _list_calls(lines: Sequence[str], computations: Computations) -> list[Call]:
    calls: list[Call] = []
    for line in lines:
        loop = LOOP.search(line)
        if loop:
            condition, body = loop.groups()
            times = _read_trip_count(line, computations[condition])
            calls += [Call(body, times), Call(condition, times)]
        elif "-update(" in line or "-done(" in line:
            continue  # They name a computation that is counted at the start instruction already.
        else:
            calls += [Call(callee, 1) for callee in CALL.findall(line)]
            for names in CALL_LIST.findall(line):
                calls += [Call(name.strip().lstrip("%"), 1) for name in names.split(",")]
    return calls


def _visit_callees_first(calls: Mapping[str, Sequence[Call]]) -> Iterator[str]:
    """Yields the entry computation and all that it calls, each after those that it calls itself.

    It is written without recursion, because programs may be nested deeply.
    """
    seen = set()
    stack = [(ENTRY, False)]
    while stack:
        name, callees_done = stack.pop()
        if callees_done:
            yield name
        elif name not in seen:
            seen.add(name)
            stack.append((name, True))
            stack += [(c.callee, False) for c in calls.get(name, ()) if c.callee not in seen]


def _read_trip_count(loop: str, condition: Sequence[str]) -> int | None:
    """Returns a loop's number of iterations, or None if it depends on data.

    Args:
        loop: the line of the loop.
        condition: the lines of the computation that is its condition. If XLA does not state the
            trip count in `loop`, it is the constant that the condition compares a counter with.
    """
    known = KNOWN_TRIP_COUNT.search(loop)
    if known:
        return int(known.group(1))
    comparisons = [line for line in condition if "ROOT" in line and "direction=LT" in line]
    compared = NAME.findall(comparisons[0]) if comparisons else []
    constants = [match for match in map(CONSTANT.match, condition) if match]
    bounds = [int(match.group(2)) for match in constants if match.group(1) in compared]
    return bounds[0] if len(bounds) == 1 else None


def parse_type(text: str) -> HloType:
    """Parses the text of a type such as "(f32[2,3]{1,0}, (s32[]))", a tuple of two types.

    Raises:
        UnknownFormatError: the text is not one type.
    """
    stack: list[list[HloType]] = [[]]  # the open tuples, outermost first
    for token in TYPE_TOKEN.findall(LAYOUT_OR_COMMENT.sub("", text)):
        if token == "(":
            stack.append([])
        elif token == ")":
            closed = stack.pop()
            if not stack:
                break
            stack[-1].append(closed)
        else:
            name, _, sizes = token[:-1].partition("[")
            shape = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
            stack[-1].append(Array(name, shape))
    if len(stack) != 1 or len(stack[0]) != 1:
        raise UnknownFormatError("the type of a collective has an unknown format")
    return stack[0][0]


def find_array_definition(name: str, lines: Sequence[str]) -> Array | None:
    """Returns the type of the array that a line defines under a name, or None if none does.

    Args:
        name: the name, such as "%rows".
        lines: the lines of a computation.
    """
    # %rows = bf16[10,8]{1,0} fusion(%p), kind=kLoop, calls=%fused
    definition = re.compile(rf"\s*(?:ROOT )?{re.escape(name)} = (\w+\[[\d,]*\])")
    for line in lines:
        match = definition.match(line)
        if match:
            array = parse_type(match.group(1))
            return array if isinstance(array, Array) else None
    return None
