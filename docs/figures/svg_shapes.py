"""Shapes, colors and the frame of the SVG pictures in docs/figures."""

import pathlib
from collections.abc import Sequence

# Distinguishable with color blindness (after Okabe and Ito). Every picture also labels what a color
# means, or uses position or a pattern besides it.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#8A5FBF")
TEXT, MUTED, NEUTRAL, PALE = "#1f2328", "#59636e", "#8c959f", "#eaeef2"
MIDDLE = {"text_anchor": "middle"}
END = {"text_anchor": "end"}
BOLD = {"font_weight": "600"}


def rectangle(x: float, y: float, width: float, height: float, fill: str, **more: str) -> str:
    """Returns a rectangle; `more` are further attributes, with _ for -."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"'
        f"{_attributes(more)}/>"
    )


def label(x: float, y: float, text: str, size: float = 13, color: str = TEXT, **more: str) -> str:
    """Returns a line of text whose baseline starts at (x, y)."""
    attributes = _attributes(more)
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}"{attributes}>{text}</text>'


def curve(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    """Returns a curve from left to right."""
    middle = (x1 + x2) / 2
    return (
        f'<path d="M{x1:g} {y1:g} C{middle:g} {y1:g} {middle:g} {y2:g} {x2:g} {y2:g}" '
        f'fill="none" stroke="{color}" stroke-width="1.4" stroke-opacity="0.75"/>'
    )


def line(points: Sequence[tuple[float, float]], color: str = NEUTRAL, **more: str) -> str:
    """Returns straight lines through points."""
    path = " L".join(f"{x:g} {y:g}" for x, y in points)
    attributes = _attributes({"stroke_width": "1.4", **more})
    return f'<path d="M{path}" fill="none" stroke="{color}"{attributes}/>'


def arrow(points: Sequence[tuple[float, float]], color: str = NEUTRAL) -> str:
    """Returns straight lines through points with a head at the last; the last line is axial."""
    (x1, y1), (x2, y2) = points[-2:]
    along = ((x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1))
    base = (x2 - 7 * along[0], y2 - 7 * along[1])
    side = (4 * along[1], 4 * along[0])
    head = f"{x2:g},{y2:g} {base[0] + side[0]:g},{base[1] + side[1]:g} "
    head += f"{base[0] - side[0]:g},{base[1] - side[1]:g}"
    return line([*points[:-1], base], color) + f'<polygon points="{head}" fill="{color}"/>'


def write_svg(path: pathlib.Path, width: int, height: int, title: str, shapes: list[str]) -> None:
    """Writes a picture: a white frame with rounded corners, its title for readers, and shapes."""
    svg = "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
            f"<title>{title}</title>",
            rectangle(0, 0, width, height, "#ffffff", rx="12", stroke="#d1d9e0"),
            *shapes,
            "</svg>",
        ]
    )
    path.parent.mkdir(exist_ok=True)
    path.write_text(svg + "\n")


def _attributes(named: dict[str, str]) -> str:
    return "".join(f' {name.replace("_", "-")}="{value}"' for name, value in named.items())
