"""Dataclass fields that carry the help and the limits of an option."""

import dataclasses
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """Returns the dataclass field of an option.

    Args:
        default: the default value.
        help: one line for docs/options.md.
        minimum: the smallest allowed value.
        above: a number that the value must exceed.
        below: a number that the value must stay below.
        choices: the allowed values of a text.
    """
    limits = dict(help=help, minimum=minimum, above=above, below=below, choices=choices)
    return dataclasses.field(default=default, metadata=limits)


def fields_of(config_class: Any) -> list[tuple[str, dataclasses.Field]]:
    """Returns ("section.option", dataclass field) of every option of a config class."""
    out: list[tuple[str, dataclasses.Field]] = []
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(field.type):
            out += [(f"{field.name}.{f.name}", f) for f in dataclasses.fields(field.type)]
        else:
            out.append((field.name, field))
    return out


def get_option(config: Any, path: str) -> Any:
    """Returns the value of the option "section.option" of a config."""
    value = config
    for name in path.split("."):
        value = getattr(value, name)
    return value
