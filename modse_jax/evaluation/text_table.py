"""Aligned text tables for the console and for the report."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple


class Column(NamedTuple):
    """The layout of one column of a text table.

    Attributes:
        width: Minimum number of characters. A longer cell is not truncated.
        align: The side on which cells are aligned.
        gap: Number of spaces before the column.
    """

    width: int
    align: Literal["left", "right"] = "right"
    gap: int = 1


def format_number(value: float | None, form: str) -> str:
    """Returns a number of a result file as text. None stands for NaN, which JSON does not have.

    Args:
        value: The number.
        form: Its format, such as ".4f".
    """
    return "nan" if value is None else format(value, form)


def format_row(columns: Sequence[Column], cells: Sequence[str]) -> str:
    """Returns the cells of one row as one aligned line, without a newline.

    Columns for which there is no cell are left out.
    """
    parts = []
    for column, cell in zip(columns, cells):
        padded = cell.ljust(column.width) if column.align == "left" else cell.rjust(column.width)
        parts.append(" " * column.gap + padded)
    return "".join(parts)


def text_table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> str:
    """Returns the rows as aligned lines, joined by newlines. A header is an ordinary first row."""
    return "\n".join(format_row(columns, row) for row in rows)
