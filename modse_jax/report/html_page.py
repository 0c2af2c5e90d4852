"""The frame and the tables of the HTML pages of reports. Pages need nothing from the network."""

import html
from collections.abc import Sequence

from modse_jax.report import plot_style

FRAME = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:{color}}}
img{{max-width:100%}}pre{{overflow-x:auto;background:#f4f4f4;padding:1em}}
.table{{overflow-x:auto}}table{{border-collapse:collapse;font-size:14px}}
th,td{{padding:.25em .7em;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}}
th{{background:#f4f4f4;vertical-align:bottom}}th.left,td.left{{text-align:left}}
.warning{{border-left:4px solid {warning};padding:.1em 1em;background:#fdf3ec}}</style>
{body}
</html>
"""


def format_page(title: str, body: str) -> str:
    """Returns a complete page.

    Args:
        title: its title, as plain text.
        body: its content, as HTML.
    """
    return FRAME.format(
        title=html.escape(title),
        color=plot_style.COLOR_TEXT,
        warning=plot_style.COLOR_VALIDATION,
        body=body,
    )


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Returns a table as HTML, which scrolls if it is wide.

    Args:
        header: the names of the columns, as plain text.
        rows: the cells, as plain text.
        left: the number of columns, from the first one, that are aligned to the left.
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        formatted = []
        for column, cell in enumerate(cells):
            attribute = ' class="left"' if column < left else ""
            formatted.append(f"<{tag}{attribute}>{html.escape(cell)}</{tag}>")
        return f"<tr>{''.join(formatted)}</tr>"

    lines = [line("th", header), *(line("td", row) for row in rows)]
    return f'<div class="table"><table>{"".join(lines)}</table></div>'
