"""Draws docs/figures/layer.svg, the picture of the layer in the README.

python docs/figures/draw_layer.py
"""

import pathlib

from svg_shapes import BOLD, COLORS, MIDDLE, MUTED, NEUTRAL, curve, label, rectangle, write_svg

WIDTHS = (300, 100, 200, 200)  # hidden units of each expert
CHOICES = ((0, 2), (1, 0), (2, 1), (3, 1), (0, 1), (2, 3))  # experts of each token, top-2
ROW, GAP, SCALE, TOP = 15, 3, 0.4, 128  # pixels; SCALE is pixels per hidden unit
TOKENS_X, ROUTER_X, SORTED_X, AXIS_X, OUTPUT_X = 40, 172, 352, 456, 900


def main() -> None:
    routed = sorted(
        ((expert, token) for token, experts in enumerate(CHOICES) for expert in experts)
    )
    height = len(routed) * (ROW + GAP)
    token_step = height / len(CHOICES)
    token_y = [TOP + (token + 0.5) * token_step for token in range(len(CHOICES))]
    row_y = [TOP + i * (ROW + GAP) for i in range(len(routed))]
    starts = [AXIS_X + SCALE * sum(WIDTHS[:expert]) for expert in range(len(WIDTHS))]
    end = AXIS_X + SCALE * sum(WIDTHS)
    headings = (
        (TOKENS_X + 20, "1  tokens"),
        (ROUTER_X + 45, "2  router"),
        (SORTED_X + 20, "3  sorted rows"),
        ((AXIS_X + end) / 2, "4  experts on one flat hidden axis"),
        (OUTPUT_X + 20, "5  combine"),
    )
    shapes = [label(x, 34, text, 15, **MIDDLE, **BOLD) for x, text in headings]
    details = (
        (TOKENS_X + 20, "[T, D]"),
        (ROUTER_X + 45, "top-2 of 4, gates"),
        (SORTED_X + 20, "[2 T, D], by expert"),
        ((AXIS_X + end) / 2, "grouped matmuls, no padding to the widest"),
        (OUTPUT_X + 20, "sum, [T, D]"),
    )
    shapes += [label(x, 54, text, 12, MUTED, **MIDDLE) for x, text in details]

    for expert, width in enumerate(WIDTHS):
        shapes.append(rectangle(starts[expert], 92, SCALE * width - 2, 20, COLORS[expert]))
        center = starts[expert] + SCALE * width / 2 - 1
        shapes.append(label(center, 106.5, str(width), 12, "#ffffff", **MIDDLE, **BOLD))
        shapes.append(label(center, 85, f"expert {expert}", 11, COLORS[expert], **MIDDLE))
        shapes.append(
            f'<path d="M{starts[expert]:g} 114 V{TOP + height:g}" stroke="{NEUTRAL}" '
            f'stroke-width="0.8" stroke-dasharray="2 4"/>'
        )
    shapes.append(rectangle(ROUTER_X, TOP, 90, height - GAP, "#f6f8fa", rx="8", stroke=NEUTRAL))
    for line, text in enumerate(("softmax of", "the two", "largest", "logits")):
        shapes.append(label(ROUTER_X + 45, TOP + 82 + 19 * line, text, 12.5, **MIDDLE))

    for token, y in enumerate(token_y):
        for x in (TOKENS_X, OUTPUT_X):
            shapes.append(rectangle(x, y - 9, 40, 18, "#eaeef2", rx="3", stroke=NEUTRAL))
            name = f"t{token}" if x == TOKENS_X else f"y{token}"
            shapes.append(label(x + 20, y + 4.5, name, 12, **MIDDLE))
        shapes.append(curve(TOKENS_X + 42, y, ROUTER_X, y, NEUTRAL))
    for (expert, token), y in zip(routed, row_y):
        color, center = COLORS[expert], y + ROW / 2
        shapes.append(curve(ROUTER_X + 90, token_y[token], SORTED_X, center, color))
        shapes.append(rectangle(SORTED_X, y, 40, ROW, color, rx="2"))
        shapes.append(label(SORTED_X + 20, y + 11.5, f"t{token}", 11, "#ffffff", **MIDDLE))
        shapes.append(
            f'<path d="M{SORTED_X + 40} {center:g} H{starts[expert]:g}" stroke="{color}" '
            f'stroke-width="1" stroke-opacity="0.45"/>'
        )
        shapes.append(rectangle(starts[expert], y, SCALE * WIDTHS[expert] - 2, ROW, color))
        right = starts[expert] + SCALE * WIDTHS[expert] - 2
        shapes.append(
            f'<path d="M{right:g} {center:g} H{end:g}" stroke="{color}" '
            f'stroke-width="1" stroke-opacity="0.45"/>'
        )
        shapes.append(curve(end, center, OUTPUT_X, token_y[token], color))
    bottom = TOP + height + 22
    shapes.append(
        label((AXIS_X + end) / 2, bottom, f"H = {sum(WIDTHS)} hidden units", 12, MUTED, **MIDDLE)
    )
    notes = (
        "Each filled bar is computed: the hidden activations of a token in one of its experts.",
        "Gate and up weights are [D, H], down weights [H, D]; expert e owns its slice of H.",
    )
    shapes += [
        label(490, 396 + 18 * i, text, 12.5, MUTED, **MIDDLE) for i, text in enumerate(notes)
    ]
    title = (
        "The layer: tokens are routed, sorted by expert, run through experts of different widths "
        "on one flat hidden axis, and combined"
    )
    write_svg(pathlib.Path(__file__).with_name("layer.svg"), 980, 430, title, shapes)


if __name__ == "__main__":
    main()
