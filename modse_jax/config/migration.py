"""Old names of options, and the formats of saved configs.

Config files, command-line flags and saved runs of older versions stay readable. The table
MIGRATIONS states what changed from each format of `config.json` to the next. A saved config carries
its format; config files and flags carry none, so that all changes are applied to them. A name that
was given up is therefore never used again for something else.
"""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from modse_jax.config.options import fields
from modse_jax.errors import UserError


class Migration(NamedTuple):
    """The changes from one format of the config to the next.

    Attributes:
        moved_options: {old "section.option": new "section.option"}.
        renamed_values: {("section.option", old value): new value}, under the new option names.
    """

    moved_options: dict[str, str]
    renamed_values: dict[tuple[str, str], str]


# Entry n - 1 converts format n into format n + 1.
MIGRATIONS = (
    Migration(
        moved_options={
            "moe.gate_term": "moe.router_noise",
            "moe.block_rows": "advanced.block_rows",
            "moe.tail_rows": "advanced.tail_rows",
            "moe.saved_activations": "advanced.saved_activations",
            "model.unroll": "advanced.unroll",
            "training.seed": "data.shuffle_seed",
            "training.loss_chunk": "advanced.loss_chunk",
            "training.spike_window": "advanced.spike_window",
            "training.max_nonfinite_steps": "advanced.max_nonfinite_steps",
            "training.replay_check": "advanced.replay_check",
            "training.hang_minutes": "advanced.hang_minutes",
        },
        renamed_values={
            ("moe.placement", "pairs"): "whole",
            ("moe.placement", "columns"): "split",
            ("moe.gate", "softmax_top_k_renormalised"): "softmax_top_k_renormalized",
            # It ran lax.ragged_dot, whose weight gradient is not fused on GPU before jax 0.12.
            ("moe.backend", "virtual"): "auto",
        },
    ),
)

FORMAT = len(MIGRATIONS) + 1  # of the configs that this version saves

_reported: set[str] = set()


def report_once(line: str) -> None:
    """Prints a line on stderr, unless this process has printed it before."""
    if line not in _reported:
        _reported.add(line)
        print(line, file=sys.stderr)


def moved_options() -> dict[str, str]:
    """Returns {old name: the name that the option has today} over all formats."""
    latest: dict[str, str] = {}
    for migration in reversed(MIGRATIONS):
        for old, new in migration.moved_options.items():
            latest[old] = latest.get(new, new)
    return latest


def describe_move(old: str, new: str) -> str:
    """Returns the line that names the new name of an option."""
    return f"{old} is now called {new}"


def migrate(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns values under the names of today, and a line for each old name that was found.

    Args:
        values: nested values of options; with "format" if they were saved by format 2 or later.

    Raises:
        UserError: the values have a newer format than FORMAT, or set an option under its old and
            its new name.
    """
    migrated = {
        name: dict(section) if isinstance(section, Mapping) else section
        for name, section in values.items()
    }
    changes = []
    for migration in MIGRATIONS[_pop_format(migrated) - 1 :]:
        for old, new in migration.moved_options.items():
            changes += _move(migrated, old, new)
        for (path, old), new in migration.renamed_values.items():
            changes += _replace(migrated, path, old, new)
    return migrated, changes


def _pop_format(values: dict[str, Any]) -> int:
    """Removes the format from saved values, and returns it."""
    number = values.pop("format", 1)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise UserError(f"the saved config has format={number!r}, which must be a positive integer")
    if number > FORMAT:
        raise UserError(
            f"the saved config has format={number}, and this version reads formats up to "
            f"{FORMAT}; use the version of modse_jax that wrote it, or a newer one"
        )
    return number


def _move(values: dict[str, Any], old: str, new: str) -> list[str]:
    """Moves an option to its new name. Returns the line to report, if there is one."""
    section, old_name = _find(values, old)
    if section is None or old_name not in section:
        return []
    if "." in new:
        values.setdefault(new.partition(".")[0], {})
    target, new_name = _find(values, new)
    if target is None:
        return []  # `loading` reports the section that holds no options
    value = section.pop(old_name)
    default = dict(fields())[new].default
    if target.get(new_name, default) not in (default, value):
        raise UserError(
            f"{old}={value!r} and {new}={target[new_name]!r} set the same option, which is now "
            f"called {new}; remove {old}"
        )
    target[new_name] = value
    return [describe_move(old, new)]


def _replace(values: dict[str, Any], path: str, old: str, new: str) -> list[str]:
    """Replaces an old value of an option. Returns the line to report, if there is one."""
    section, name = _find(values, path)
    if section is None or section.get(name) != old:
        return []
    section[name] = new
    return [f"{path}={old} is replaced by {path}={new}"]


def _find(values: dict[str, Any], path: str) -> tuple[dict[str, Any] | None, str]:
    """Returns (section, name) of an option; None if there is no such section of options."""
    section_name, _, name = path.rpartition(".")
    section = values.get(section_name) if section_name else values
    return (section if isinstance(section, dict) else None), name
