"""Counts the bytes that a compiled program sends between devices, from its HLO text.

A collective in a loop counts as often as the loop runs. Bytes are those that one device sends if
the collective runs as a ring of n devices: (n - 1) / n of the entire array for an all-gather or a
reduce-scatter, twice that for an all-reduce, and (n - 1) / n of a device's operand for an
all-to-all. A ragged all-to-all is counted as if every device received equally many rows.
"""

import collections
import re
from collections.abc import Sequence
from typing import NamedTuple

from modse_jax.planning import hlo_text, replica_groups
from modse_jax.planning.hlo_text import Array, HloType, UnknownFormatError

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)

# XLA for TPU writes a reduce-scatter as an all-reduce in a computation of this name:
#   %all-reduce-scatter.1 (p: bf16[32,8]) -> bf16[8,8] {
TPU_REDUCE_SCATTER = "all-reduce-scatter"

# The line of a collective:
#   %s = (f32[2,6]{1,0}, f32[8,6]{1,0}) all-gather-start(%p), replica_groups={{0,1,2,3}}
INSTRUCTION = re.compile(
    rf"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(([^)]*)(.*)"
)

# An operand in the line of a collective:
#   all-gather-start(%p, /*index=1*/%q.2)
OPERAND = re.compile(r"%[\w.\-]+")

# The operation in the JAX code from which an instruction comes:
#   metadata={op_name="jit(step)/transpose/dot_general" source_file="..."}
OP_NAME = re.compile(r'op_name="([^"]*)"')

# XLA for TPU may divide one collective into several instructions that overlap with computation.
# These have a common chain_id and are counted as one:
#   %g = f32[16]{0} all-gather(%p), frontend_attributes={chain_id="3"}
CHAIN_ID = re.compile(r'chain_id="(\d+)"')


class Collective(NamedTuple):
    """A collective of a compiled program."""

    kind: str  # one of KINDS
    bytes: float  # bytes that a device sends each time the collective runs
    times: int  # how often it runs in one run of the program
    group_size: int  # number of devices that exchange data with each other
    shape: str  # shape of the result; several if XLA combined several collectives
    source: str  # XLA's op_name: the operation in the JAX code that it comes from
    groups: replica_groups.Groups  # the groups of device numbers that exchange data


class FoundCollectives(NamedTuple):
    """The collectives of a program, and reports on those that could not be counted."""

    collectives: list[Collective]
    unknown: list[str]  # one sentence for each collective that could not be counted


class Instruction(NamedTuple):
    """The parsed line of a collective in an HLO program."""

    kind: str  # one of KINDS
    type: str  # the text of the HLO type, such as "f32[8,6]{1,0}"
    is_start: bool  # True for the first half of an asynchronous collective
    operands: list[str]  # names of the operands, such as "%p"
    text: str  # the line


class Arrays(NamedTuple):
    """The arrays that a collective reads and writes."""

    operands: list[Array]  # empty if the type of the instruction does not show them
    results: list[Array]


def find_collectives(hlo: str) -> FoundCollectives:
    """Returns the collectives of a compiled program, and reports those that cannot be counted.

    A collective cannot be counted if it is in a loop whose trip count depends on data, or if the
    format of its line is unknown.
    """
    computations = hlo_text.split_computations(hlo)
    runs = hlo_text.count_runs(computations)
    found: list[Collective] = []
    unknown: list[str] = []
    chains: set[tuple[str, str]] = set()
    for name, lines in computations.items():
        times = runs.get(name, 0)
        for instruction in _parse_instructions(lines) if times != 0 else []:
            try:
                collective = _describe(instruction, times, lines)
            except UnknownFormatError as reason:
                unknown.append(f"{reason}: {instruction.text.strip()[:200]}")
                continue
            if name.startswith(TPU_REDUCE_SCATTER):  # sends half of what an all-reduce sends
                collective = collective._replace(kind="reduce-scatter", bytes=collective.bytes / 2)
            chain = CHAIN_ID.search(instruction.text)
            if chain:
                piece = (collective.kind, chain.group(1))
                if piece in chains:
                    continue
                chains.add(piece)
            found.append(collective)
    return FoundCollectives(found, unknown)


def list_collectives(hlo: str) -> list[Collective]:
    """Returns every collective (all-gather, all-reduce, ...) in the text of a compiled program.

    Raises:
        ValueError: the number of bytes that a collective sends is not clear from the text.
    """
    found = find_collectives(hlo)
    if found.unknown:
        raise ValueError("; ".join(found.unknown))
    return found.collectives


def bytes_by_kind(collectives: Sequence[Collective]) -> dict[str, float]:
    """Returns {kind of collective: bytes that a device sends in one run of the program}."""
    total: dict[str, float] = collections.defaultdict(float)
    for collective in collectives:
        total[collective.kind] += collective.bytes * collective.times
    return {kind: total[kind] for kind in KINDS if total[kind]}


def bytes_between_hosts(collectives: Sequence[Collective], devices_per_host: int) -> float:
    """Returns the bytes that a device must send to other hosts in one run of the program.

    It is a lower bound for any algorithm. An all-to-all sends the same amount to every other
    device. An all-gather or a reduction has to send the result to each host only once, and the
    devices of a host share this work equally.

    Args:
        collectives: the collectives of the program.
        devices_per_host: device i is on host i // devices_per_host.
    """
    total = 0.0
    for collective in collectives:
        shares = [
            _share_between_hosts(collective.kind, group, devices_per_host)
            for group in collective.groups
        ]
        total += collective.bytes * collective.times * max(shares)
    return total


def crosses_hosts(collective: Collective, devices_per_host: int) -> bool:
    """Returns whether some group of a collective has devices on several hosts."""
    return any(
        len({device // devices_per_host for device in group}) > 1 for group in collective.groups
    )


def _share_between_hosts(kind: str, group: Sequence[int], devices_per_host: int) -> float:
    """Returns the fraction of the bytes that a device sends in a collective that cross hosts.

    Args:
        kind: the kind of collective.
        group: the numbers of the devices that take part.
        devices_per_host: device i is on host i // devices_per_host.
    """
    num_devices = len(group)
    devices_on_host = collections.Counter(device // devices_per_host for device in group)
    if len(devices_on_host) == 1:
        return 0.0
    if kind == "collective-permute":
        return 1.0
    if kind in ("all-to-all", "ragged-all-to-all"):
        return (num_devices - min(devices_on_host.values())) / (num_devices - 1)
    return (len(devices_on_host) - 1) / (num_devices - 1)


def _parse_instructions(lines: Sequence[str]) -> list[Instruction]:
    instructions = []
    for line in lines:
        match = INSTRUCTION.match(line)
        if match:
            type_text, kind, start, operands, _ = match.groups()
            names = OPERAND.findall(operands)
            instructions.append(Instruction(kind, type_text, bool(start), names, line))
    return instructions


def _describe(instruction: Instruction, times: int | None, lines: Sequence[str]) -> Collective:
    """Returns what an instruction sends, and how often.

    Args:
        instruction: the parsed line of a collective.
        times: how often it runs in one run of the program; None if that depends on data.
        lines: all lines of the computation (HLO's word for a function) that contains it.

    Raises:
        UnknownFormatError: the collective cannot be counted.
    """
    kind = instruction.kind
    if times is None:
        raise UnknownFormatError(
            f"a {kind} in a loop with a data-dependent trip count cannot be counted"
        )
    arrays = _match_operands(instruction, hlo_text.parse_type(instruction.type))
    result_bytes = sum(array.num_bytes for array in arrays.results)
    if kind == "ragged-all-to-all":
        result_bytes = min(result_bytes, _ragged_operand_bytes(instruction, arrays, lines))
    groups = replica_groups.parse_replica_groups(instruction.text)
    group_size = 2 if kind == "collective-permute" else len(groups[0])
    source = OP_NAME.search(instruction.text)
    return Collective(
        kind=kind,
        bytes=_sent_bytes(kind, result_bytes, group_size),
        times=times,
        group_size=group_size,
        shape=" ".join(map(str, arrays.results)),
        source=source.group(1) if source else "",
        groups=groups,
    )


def _sent_bytes(kind: str, result_bytes: float, group_size: int) -> float:
    """Returns the bytes that a device sends in a ring; see the description of this module.

    Args:
        kind: the kind of collective.
        result_bytes: the size of the collective's result on one device.
        group_size: the number of devices that take part.
    """
    if kind == "collective-permute":
        return result_bytes
    if kind == "reduce-scatter":  # its result is 1 / group_size of the array
        return result_bytes * (group_size - 1)
    share = (group_size - 1) / group_size
    if kind == "all-reduce":
        return 2 * result_bytes * share
    return result_bytes * share


def _ragged_operand_bytes(instruction: Instruction, arrays: Arrays, lines: Sequence[str]) -> float:
    """Returns the size of the first operand of a ragged all-to-all: the array of rows to send.

    Either this array or the result is full of rows, and the other one has room to spare. The caller
    therefore counts the smaller of the two sizes. It is infinite if the operand is not found.
    """
    if arrays.operands:
        return arrays.operands[0].num_bytes
    sent = hlo_text.find_array_definition(instruction.operands[0], lines)
    return float("inf") if sent is None else sent.num_bytes


def _match_operands(instruction: Instruction, type_: HloType) -> Arrays:
    """Splits the type of a collective into the types of its operands and of its results.

    XLA writes the type in several ways. For a synchronous collective it is that of the results:
        %r = (f32[8], s32[4]) all-reduce(%a, %b)
    also for the start of an asynchronous all-reduce in jax 0.10:
        %r = (f32[8], s32[4]) all-reduce-start(%a, %b)
    For other starts it is operands, then results, sometimes followed by internal values:
        %s = (f32[2,6], f32[8,6]) all-gather-start(%p)
        %c = (f32[9], f32[9], u32[], u32[]) collective-permute-start(%p)
    Several operands or results are in tuples, and sometimes a single operand, too:
        %s = ((bf16[2,6], s32[2]), (bf16[8,6], s32[8])) all-gather-start(%p, %q)
        %s = ((f32[16]), f32[16]) all-reduce-start(%p)

    Raises:
        UnknownFormatError: the type has none of these forms.
    """
    count = len(instruction.operands)
    is_start = instruction.is_start
    if isinstance(type_, Array):
        return Arrays([], [type_])
    first = type_[0] if type_ else None
    arrays = [part for part in type_ if isinstance(part, Array)]
    if isinstance(first, list) and is_start and len(type_) >= 2:
        operands = _only_arrays(first)
        results = _only_arrays(type_[1]) if isinstance(type_[1], list) else [type_[1]]
        same_number = len(results) == count or instruction.kind == "ragged-all-to-all"
        if len(operands) == count and same_number:
            return Arrays(operands, results)
    elif len(arrays) == len(type_):
        if len(arrays) == count and (not is_start or instruction.kind == "all-reduce"):
            return Arrays([], arrays)
        if is_start and len(arrays) >= 2 * count:
            return Arrays(arrays[:count], arrays[count : 2 * count])
    raise UnknownFormatError(f"the type of a collective does not match its {count} operand(s)")


def _only_arrays(types: Sequence[HloType]) -> list[Array]:
    if not all(isinstance(part, Array) for part in types):
        raise UnknownFormatError("the type of a collective has an unknown format")
    return [part for part in types if isinstance(part, Array)]
