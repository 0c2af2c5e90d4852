"""What a compiled step sends between devices, counted from its HLO text, loops included.

Bytes are those that a device sends in a ring: of an all-gather or reduce-scatter over n devices (n - 1) / n of the
whole array, of an all-reduce twice that, of an all-to-all (n - 1) / n of what it holds; of a ragged one too, as if
every device were sent as many rows as the next.
"""

import collections
import math
import re
from typing import NamedTuple

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
}


class Collective(NamedTuple):
    kind: str
    bytes: float  # sent by a device, each time
    times: int  # in a step
    group: int  # devices
    shape: str  # of what it makes; several, where XLA has joined several
    source: str  # op_name: where it comes from


def collectives(hlo: str) -> list[Collective]:
    """Every collective of a compiled program, with how often it runs.

    A loop runs as often as its condition compares its counter with a constant; what is inside a loop whose end is data
    is counted once a turn, for one turn: such loops of ours hold no collective, else this raises ValueError.
    """
    bodies = _computations(hlo)
    times = _times(bodies)
    out, chains = [], set()
    for name, lines in bodies.items():
        for line in lines:
            found = _one(line, times[name], lines)
            if found is None or found.times == 0:
                continue
            if name.startswith(
                "all-reduce-scatter"
            ):  # so a TPU writes a reduce-scatter, and sends half
                found = found._replace(kind="reduce-scatter", bytes=found.bytes / 2)
            chain = re.search(
                r'chain_id="(\d+)"', line
            )  # a TPU spreads one collective over pieces of its neighbours
            if chain:
                piece = (found.kind, chain.group(1))
                if piece in chains:
                    continue
                chains.add(piece)
            out.append(found)
    return out


def bytes_by_kind(found: list[Collective]) -> dict[str, float]:
    """Bytes that a device sends in a step."""
    out = collections.Counter()
    for c in found:
        out[c.kind] += c.bytes * c.times
    return {kind: float(out[kind]) for kind in KINDS if out[kind]}


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
    match = re.match(rf"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
    if not match:
        return None
    kind, shapes = (
        match.group(2),
        re.findall(r"(\w+)\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", match.group(1))),
    )
    sizes = [
        BYTES[t] * math.prod(int(n) for n in dims.split(",") if n)
        for t, dims in shapes
        if t in BYTES
    ]
    group = _group(line)
    if times < 0:
        raise ValueError(
            f"a {kind} in a loop whose end is data cannot be counted: {line.strip()[:200]}"
        )
    # A start makes (operands, results, ...): the results alone, by their place.
    size = (
        sum(sizes)
        if not match.group(3) or kind == "all-reduce"
        else sizes[1]
        if kind != "collective-permute"
        else sizes[0]
    )
    if (
        kind == "ragged-all-to-all"
    ):  # of one operand and the result, the one that is full: the other has spare room
        operand = re.search(r"ragged-all-to-all(?:-start)?\(%?([\w.\-]+)", line).group(1)
        made = next((x for x in lines if re.match(rf"\s*%?{re.escape(operand)} = ", x)), line)
        size = min(
            size,
            *(
                BYTES[t] * math.prod(int(n) for n in dims.split(",") if n)
                for t, dims in re.findall(r"= (\w+)\[([\d,]*)\]", made)
            ),
        )
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
    made = " ".join(f"{t}[{dims}]" for t, dims in shapes)
    return Collective(kind, sent, times, group, made, source.group(1) if source else "")


def _group(line):
    if "source_target_pairs" in line:
        return 2
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed.group(1).split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota.group(2))
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))?\s*\{([^}:]*)\}", line
    )
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh.group(2)))
    raise ValueError(
        f"the devices of a collective are written in an unknown way: {line.strip()[:300]}"
    )
