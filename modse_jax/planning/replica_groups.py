"""Parses which devices take part in a collective, from its line of an HLO program.

XLA writes the groups of devices in one of these formats:

    replica_groups={{0,1},{2,3}}
    replica_groups=[2,4]<=[4,2]T(1,0)              2 groups of 4, of the transposed device numbers
    replica_groups=mesh['a'=4,'b'=2] {'a'}         devices that differ along the axis `a` only
    replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}
    replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}    `b` is split into 2 x 2; along the second 2
    source_target_pairs={{0,1},{1,0}}
"""

import math
import re
from typing import NamedTuple

import numpy as np

from modse_jax.planning.hlo_text import UnknownFormatError

# replica_groups={{0,1},{2,3}}
LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}\s]*\})\}")
LISTED_GROUP = re.compile(r"\{([\d,\s]+)\}")

# replica_groups=[2,4]<=[4,2]T(1,0)
IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")

# Matches [4,2]T(1,0).
DEVICE_NUMBERS = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")

# replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}
MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))?\s*\{([^}]*)\}")

# Matches 'a'=4 and 'b'=2 in 'a'=4,'b'=2.
MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")

# Matches 'a' and 'b':(2)2 in 'a','b':(2)2.
GROUP_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")

Groups = tuple[tuple[int, ...], ...]


class AxisPart(NamedTuple):
    """A part of a mesh axis along which the devices of a group differ.

    XLA writes {'b':(2)3} for an axis `b` of size 12 that is viewed as 2 x 3 x 2, if the devices of
    a group differ along the 3.
    """

    preceding: int  # the product of the factors before the part, here 2
    size: int  # the size of the part, here 3


def parse_replica_groups(line: str) -> Groups:
    """Returns the groups of device numbers that exchange data with each other in a collective.

    Raises:
        UnknownFormatError: the line has none of the formats in the description of this module.
    """
    listed = LISTED.search(line)
    if listed:
        groups = LISTED_GROUP.findall(listed.group(1))
        return tuple(tuple(map(int, group.split(","))) for group in groups)
    iota = IOTA.search(line)
    if iota:
        num_groups, group_size, numbers = iota.groups()
        return _to_tuples(_parse_numbers(numbers).reshape(int(num_groups), int(group_size)))
    mesh = MESH.search(line)
    if mesh:
        return _parse_mesh(*mesh.groups())
    raise _unknown_format()


def _unknown_format() -> UnknownFormatError:
    return UnknownFormatError("the replica groups of a collective have an unknown format")


def _parse_numbers(text: str) -> np.ndarray:
    """Returns the array of device numbers that a text such as "[4,2]T(1,0)" describes.

    It is 0, 1, ... in the shape [4, 2], transposed to the order (1, 0) of axes.
    """
    match = DEVICE_NUMBERS.fullmatch(text)
    if not match:
        raise _unknown_format()
    shape = [int(size) for size in match.group(1).split(",")]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    if match.group(2):
        numbers = numbers.transpose([int(axis) for axis in match.group(2).split(",")])
    return numbers


def _parse_mesh(mesh_axes: str, device_ids: str | None, group_axes: str) -> Groups:
    """Returns the groups along some axes of a mesh.

    Args:
        mesh_axes: names and sizes, such as "'a'=4,'b'=2".
        device_ids: the device numbers of the mesh, such as "[2,4]T(1,0)" or "3,2,1,0"; None for
            0, 1, and so on.
        group_axes: the axes along which the devices of a group differ, such as "'a','b':(2)2".
    """
    sizes = {name: int(size) for name, size in MESH_AXIS.findall(mesh_axes)}
    try:
        shape, grouped = _factor_axes(sizes, _parse_group_axes(group_axes, sizes))
        numbers = _parse_device_ids(device_ids, math.prod(sizes.values())).reshape(shape)
    except (ValueError, ZeroDivisionError):
        raise _unknown_format() from None
    others = [axis for axis in range(len(shape)) if axis not in grouped]
    group_size = math.prod(shape[axis] for axis in grouped)
    return _to_tuples(numbers.transpose(others + grouped).reshape(-1, group_size))


def _parse_group_axes(text: str, sizes: dict[str, int]) -> dict[str, list[AxisPart]]:
    parts: dict[str, list[AxisPart]] = {}
    for name, preceding, size in GROUP_AXIS.findall(text):
        part = AxisPart(int(preceding or 1), int(size or sizes.get(name, 0)))
        parts.setdefault(name, []).append(part)
    return parts


def _parse_device_ids(text: str | None, count: int) -> np.ndarray:
    if text is None:
        return np.arange(count)
    if text.startswith("["):
        return _parse_numbers(text)
    return np.array([int(number) for number in text.split(",")])


def _factor_axes(
    sizes: dict[str, int], parts: dict[str, list[AxisPart]]
) -> tuple[list[int], list[int]]:
    """Splits mesh axes of which only a part is used, so that every part is an axis of its own.

    Args:
        sizes: {mesh axis: size}.
        parts: {mesh axis: its parts along which the devices of a group differ}.

    Returns:
        The shape of the mesh with all its axes and parts of axes, and the positions in this shape
        of those along which the devices of a group differ.

    Raises:
        ValueError: `parts` names an axis that the mesh does not have, or none.
        ZeroDivisionError: a part has size 0.
    """
    if not parts or not set(parts) <= set(sizes):
        raise ValueError
    shape: list[int] = []
    grouped: list[int] = []
    for name, total in sizes.items():
        done = 1
        for part in sorted(parts.get(name, [])):
            shape += [part.preceding // done, part.size]
            grouped.append(len(shape) - 1)
            done = part.preceding * part.size
        shape.append(total // done)
    return shape, grouped


def _to_tuples(groups: np.ndarray) -> Groups:
    return tuple(tuple(int(device) for device in group) for group in groups)
