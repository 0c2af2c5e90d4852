"""Looks up options whose values are names, such as the gate of a router.

A table of functions by name is used instead of a chain of `if`, whose last branch would silently
accept every unknown name.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")


def look_up(table: Mapping[str, Value], name: str, choice: str) -> Value:
    """Returns the entry of a table for a choice.

    Args:
      table: {choice: value}.
      name: the name of the option, for the error message.
      choice: the value of the option.

    Raises:
      ValueError: the table has no such choice.
    """
    check(table, name, choice)
    return table[choice]


def check(choices: Iterable[str], name: str, choice: str) -> None:
    """Raises ValueError if `choice` is not one of the choices of the option `name`."""
    known = tuple(choices)
    if choice not in known:
        raise ValueError(f"{name}={choice!r} is unknown; choose one of {', '.join(known)}")
