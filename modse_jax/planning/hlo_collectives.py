"""Counts what a compiled step sends between devices, from its HLO text, loops included.

Bytes are those that a device sends in a ring: of an all-gather or reduce-scatter over n devices (n - 1) / n of the
whole array, of an all-reduce twice that, of an all-to-all (n - 1) / n of its operand. A ragged all-to-all is counted
as if every device received equally many rows.
"""

import collections
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)


BYTES = {
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


class Collective(NamedTuple):
    kind: str
    bytes: float  # sent by a device, each time
    times: int  # in a step
    group: int  # devices
    shape: str  # of the result; several, where XLA has joined several collectives
    source: str  # op_name: where it comes from
    groups: tuple[tuple[int, ...], ...]  # device numbers that exchange with each other


class Reading(NamedTuple):
    collectives: list[Collective]
    unknown: list[str]  # why a collective is not among them, a sentence each


class _NotUnderstood(Exception):
    """The reason why a line with a collective cannot be counted."""


def read(hlo: str) -> Reading:
    """Returns every collective of a compiled program with how often it runs, and what was not understood.

    A loop runs as often as its condition compares its counter with a constant. A collective in a loop whose end is
    data is not counted but reported.
    """
    bodies = _computations(hlo)
    times = _times(bodies)
    found, unknown, chains = [], [], set()
    for name, lines in bodies.items():
        for line in lines:
            try:
                one = _one(line, times[name], lines)
            except _NotUnderstood as reason:
                unknown.append(f"{reason}: {line.strip()[:200]}")
                continue
            if one is None:
                continue
            if name.startswith(
                "all-reduce-scatter"
            ):  # so a TPU writes a reduce-scatter, and sends half
                one = one._replace(kind="reduce-scatter", bytes=one.bytes / 2)
            chain = re.search(
                r'chain_id="(\d+)"', line
            )  # a TPU spreads one collective over pieces of its neighbours
            if chain:
                piece = (one.kind, chain.group(1))
                if piece in chains:
                    continue
                chains.add(piece)
            found.append(one)
    return Reading(found, unknown)


def collectives(hlo: str) -> list[Collective]:
    """The collectives of `read`. Raises ValueError where one is not understood."""
    found, unknown = read(hlo)
    if unknown:
        raise ValueError("; ".join(unknown))
    return found


def bytes_by_kind(found: list[Collective]) -> dict[str, float]:
    """Bytes that a device sends in a step."""
    out = collections.Counter()
    for c in found:
        out[c.kind] += c.bytes * c.times
    return {kind: float(out[kind]) for kind in KINDS if out[kind]}


def bytes_between_hosts(found: list[Collective], devices_per_host: int) -> float:
    """Returns the bytes that a device must send to other hosts in a step; device i is on host i // devices_per_host.

    An all-to-all sends to every peer alike. A gather or reduction can stay inside the hosts but for one copy of the
    result, which the devices of a host send in equal parts: the least that any algorithm needs.
    """
    return float(
        sum(
            c.bytes
            * c.times
            * max(_share_between_hosts(c.kind, group, devices_per_host) for group in c.groups)
            for c in found
        )
    )


def _share_between_hosts(kind: str, group: Sequence[int], devices_per_host: int) -> float:
    devices, on_host = (
        len(group),
        collections.Counter(device // devices_per_host for device in group),
    )
    if len(on_host) == 1:
        return 0.0
    if kind == "collective-permute":
        return 1.0
    if kind in ("all-to-all", "ragged-all-to-all"):
        return (devices - min(on_host.values())) / (devices - 1)
    return (len(on_host) - 1) / (devices - 1)


def _computations(hlo):
    """{name: its lines}; the entry's name is "ENTRY". One ends where the next begins: a line of its own may be "}", in
    what a kernel notes of itself."""
    out, current = {}, None
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head and not line.startswith(" "):
            current = "ENTRY" if head.group(1) else head.group(2)
            out[current] = []
        elif current is not None:
            out[current].append(line)
    return out


def _times(bodies):
    """{computation: how often it runs in a step}; -1 per turn of a loop whose end is data."""
    edges = collections.defaultdict(list)  # caller -> (callee, turns)
    for name, lines in bodies.items():
        for line in lines:
            loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            if loop:
                turns = _turns(line, bodies[loop.group(1)])
                edges[name] += [(loop.group(2), turns), (loop.group(1), turns)]
            elif "-update(" in line or "-done(" in line:
                continue  # the computation of the start
            else:
                for callee in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line):
                    edges[name].append((callee, 1))
                for callee in re.findall(
                    r"(?:true_computation|false_computation)=%?([\w.\-]+)", line
                ):
                    edges[name].append((callee, 1))
                for group in re.findall(
                    r"(?:branch_computations|called_computations)=\{([^}]*)\}", line
                ):
                    edges[name] += [(callee.strip().lstrip("%"), 1) for callee in group.split(",")]
    times = collections.Counter({"ENTRY": 1})
    for name in reversed(list(_postorder(edges))):
        for callee, turns in edges[name]:
            inside = times[name] * abs(turns)
            times[callee] += -abs(inside) if turns < 0 or times[name] < 0 else inside
    return times


def _postorder(edges):
    seen, stack = set(), [("ENTRY", False)]
    while stack:
        name, done = stack.pop()
        if done:
            yield name
        elif name not in seen:
            seen.add(name)
            stack += [
                (name, True),
                *((callee, False) for callee, _ in edges[name] if callee not in seen),
            ]


def _turns(line, condition):
    known = re.search(r'known_trip_count":\s*\{"n":\s*"(\d+)"', line)
    if known:
        return int(known.group(1))
    compared = next(
        (re.findall(r"[\w.\-]+", x) for x in condition if "ROOT" in x and "direction=LT" in x), ()
    )
    constants = [re.match(r"\s*%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", x) for x in condition]
    bounds = [int(c.group(2)) for c in constants if c and c.group(1) in compared]
    return bounds[0] if len(bounds) == 1 else -1


def _one(line, times, lines):
    """The collective of a line, None where it has none or none that runs. Raises _NotUnderstood."""
    match = re.match(rf"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\((.*)", line)
    if not match or times == 0:
        return None
    text, kind, start, rest = match.groups()
    if times < 0:
        raise _NotUnderstood(f"a {kind} in a loop whose end is data cannot be counted")
    operands = re.findall(r"%[\w.\-]+", rest.partition(")")[0])
    sources, results = _operands_and_results(kind, _parse_type(text), bool(start), len(operands))
    size = sum(_bytes(array) for array in results)
    if (
        kind == "ragged-all-to-all"
    ):  # of operand and result, the one that is full: the other has spare room
        sources = sources or _definition(operands[0], lines)
        size = min(size, *(_bytes(array) for array in sources[:1]))
    groups = _groups(line)
    group = 2 if kind == "collective-permute" else len(groups[0])
    share = (group - 1) / group
    sent = {
        "all-gather": size * share,
        "all-reduce": 2 * size * share,
        "reduce-scatter": size * (group - 1),
        "all-to-all": size * share,
        "ragged-all-to-all": size * share,
        "collective-permute": size,
    }[kind]
    source = re.search(r'op_name="([^"]*)"', line)
    made = " ".join(f"{array.type}[{','.join(map(str, array.shape))}]" for array in results)
    return Collective(kind, sent, times, group, made, source.group(1) if source else "", groups)


class _Array(NamedTuple):
    type: str
    shape: tuple[int, ...]


def _bytes(array):
    if array.type not in BYTES:
        raise _NotUnderstood(f"the size of the type {array.type} of a collective is not known")
    return BYTES[array.type] * math.prod(array.shape)


def _parse_type(text):
    """An _Array, or a list of such and of lists where the type is a tuple: "(f32[2,3]{1,0}, (s32[]))"."""
    text = re.sub(r"\{[^}]*\}|/\*.*?\*/|\s", "", text)  # layouts and comments
    root = [[]]
    for token in re.findall(r"\w+\[[^\]]*\]|[()]", text):
        if token == "(":
            root.append([])
        elif token == ")":
            inner = root.pop()
            root[-1].append(inner)
        else:
            name, _, dims = token[:-1].partition("[")
            root[-1].append(_Array(name, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)))
    if len(root) != 1 or len(root[0]) != 1:
        raise _NotUnderstood("the type of a collective is written in an unknown way")
    return root[0][0]


def _operands_and_results(kind, parsed, start, count):
    """(operands, results), lists of _Array, from a collective's type; operands where the type shows them.

    What is not a start makes its results alone:
        %r = (f32[8], s32[4]) all-reduce(%a, %b)
    and so does the start of an all-reduce of jax 0.10:
        %r = (f32[8], s32[4]) all-reduce-start(%a, %b)
    Other starts make operands and results, then perhaps contexts:
        %s = (f32[2,6], f32[8,6]) all-gather-start(%p)
        %c = (f32[9], f32[9], u32[], u32[]) collective-permute-start(%p)
    with brackets around several, or around the operands alone:
        %s = ((bf16[2,6], s32[2]), (bf16[8,6], s32[8])) all-gather-start(%p, %q)
        %s = ((f32[16]), f32[16]) all-reduce-start(%p)
    """
    if isinstance(parsed, _Array):
        return [], [parsed]
    if isinstance(parsed[0], list) and start and len(parsed) >= 2:
        results = parsed[1] if isinstance(parsed[1], list) else [parsed[1]]
        if len(parsed[0]) == count and (len(results) == count or kind == "ragged-all-to-all"):
            return parsed[0], results
    elif all(isinstance(array, _Array) for array in parsed):
        if len(parsed) == count and (not start or kind == "all-reduce"):
            return [], parsed
        if start and len(parsed) >= 2 * count:
            return parsed[:count], parsed[count : 2 * count]
    raise _NotUnderstood(
        f"what the {count} operands of a collective make is written in an unknown way"
    )


def _definition(name, lines):
    """The operand's type as a list of one array; nothing, where it is not in these lines."""
    for line in lines:
        match = re.match(rf"\s*(?:ROOT )?{re.escape(name)} = (\w+\[[\d,]*\])", line)
        if match:
            return [_parse_type(match.group(1))]
    return []


def _groups(line):
    """Tuples of device numbers, from one of:

    replica_groups={{0,1},{2,3}}
    replica_groups=[2,4]<=[4,2]T(1,0)                        2 groups of 4 of the transposed numbers
    replica_groups=mesh['a'=4,'b'=2] {'a'}                   devices that differ in `a` alone
    replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}
    replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}              `b` is 2 x 2, the first of them left out
    source_target_pairs={{0,1},{1,0}}
    """
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}\s]*\})\}", line)
    if listed:
        return tuple(
            tuple(map(int, group.split(",")))
            for group in re.findall(r"\{([\d,\s]+)\}", listed.group(1))
        )
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", line)
    if iota:
        return _as_groups(_iota(iota.group(3)).reshape(int(iota.group(1)), int(iota.group(2))))
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))?\s*\{([^}]*)\}", line
    )
    if mesh:
        return _mesh_groups(*mesh.groups())
    raise _NotUnderstood("the devices of a collective are written in an unknown way")


def _iota(text):
    """Device numbers from "<=[4,2]T(1,0)" or "[4,2]T(1,0)": 0, 1, ... as an array of that shape, transposed."""
    shape, axes = re.fullmatch(r"(?:<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    numbers = np.arange(math.prod(map(int, shape.split(",")))).reshape(
        tuple(map(int, shape.split(",")))
    )
    return numbers.transpose(tuple(map(int, axes.split(",")))) if axes else numbers


def _mesh_groups(sizes, device_ids, axes):
    """Groups along axes of a mesh, each "'name'" or, for a part of one, "'name':(devices before the part)its size"."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", sizes)}
    parts = {}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        parts.setdefault(name, []).append((int(before or 1), int(size or sizes.get(name, 0))))
    try:
        numbers = (
            np.arange(math.prod(sizes.values()))
            if device_ids is None
            else _iota(device_ids)
            if device_ids.startswith("[")
            else np.array([int(n) for n in device_ids.split(",")])
        )
        shape, inside = [], []
        for name, total in sizes.items():
            done = 1
            for before, size in sorted(parts.pop(name, [])):
                shape += [before // done, size]
                inside.append(len(shape) - 1)
                done = before * size
            shape.append(total // done)
        if parts or not inside:
            raise ValueError
        numbers = numbers.reshape(shape)
    except (AttributeError, ValueError, ZeroDivisionError):
        raise _NotUnderstood("the devices of a collective are written in an unknown way") from None
    outside = [axis for axis in range(len(shape)) if axis not in inside]
    return _as_groups(
        numbers.transpose(outside + inside).reshape(-1, math.prod(shape[axis] for axis in inside))
    )


def _as_groups(numbers):
    return tuple(tuple(int(device) for device in group) for group in numbers)
