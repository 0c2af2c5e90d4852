"""Draws the pictures of docs/study.md, docs/figures/study/*.svg: one for every axis.

python docs/figures/draw_study.py

Gates, capacities and bias updates in the pictures are computed here by their formulas.
"""

import math
import pathlib
from collections.abc import Sequence

from svg_shapes import (
    BOLD,
    COLORS,
    END,
    MIDDLE,
    MUTED,
    NEUTRAL,
    PALE,
    TEXT,
    arrow,
    label,
    line,
    rectangle,
    write_svg,
)

FOLDER = pathlib.Path(__file__).parent / "study"
BLUE, ORANGE, GREEN, VIOLET = COLORS
WHITE = "#ffffff"


def heading(x: float, text: str, detail: str = "", y: float = 34) -> list[str]:
    """Returns a centered heading with a line of detail below it."""
    return [
        label(x, y, text, 15, **MIDDLE, **BOLD),
        label(x, y + 20, detail, 12, MUTED, **MIDDLE),
    ]


def box(x: float, y: float, width: float, height: float, text: str, color: str = PALE) -> str:
    """Returns a box with rounded corners and a centered text."""
    fill = WHITE if color != PALE else TEXT
    return rectangle(x, y, width, height, color, rx="4", stroke=NEUTRAL) + label(
        x + width / 2, y + height / 2 + 4.5, text, 12.5, fill, **MIDDLE
    )


def expert_bar(
    x: float, y: float, height: float, widths: Sequence[float], chosen: Sequence[int], color: str
) -> str:
    """Returns experts side by side on the flat axis; chosen ones are filled."""
    shapes = []
    for expert, width in enumerate(widths):
        fill = color if expert in chosen else PALE
        gap = min(2.0, width / 4)
        shapes.append(rectangle(x, y, width - gap, height, fill))
        x += width
    return "".join(shapes)


def draw_grid() -> None:
    """Draws granularity and sparsity: slices at s = 8, and the cells of the grid."""
    dense, left, top = 56, 128, 128
    shapes = heading(left + 4 * dense, "one dense FFN, sliced", "s = 8; filled: experts of a token")
    shapes.append(label(left - 14, 96, "dense", 12.5, **END))
    shapes.append(rectangle(left, 80, dense - 2, 24, NEUTRAL))
    for row, active in enumerate((1, 2, 4, 8, 16)):
        y = top + 44 * row
        experts = 8 * active
        chosen = [(5 + 7 * choice * experts // (8 * active)) % experts for choice in range(active)]
        shapes.append(label(left - 14, y + 11, f"n = {experts}", 12.5, **END))
        g = "1" if active == 1 else f"1/{active}"
        shapes.append(label(left - 14, y + 25, f"g = {g}, k = {active}", 11, MUTED, **END))
        shapes.append(expert_bar(left, y, 26, [dense / active] * experts, chosen, BLUE))
    shapes.append(label(left, 366, "Each row has the total width and the FLOPs of the others.", 12))
    shapes += _grid_cells(left=690, top=100)
    title = "Granularity and sparsity: a dense FFN cut into experts, and the 49 cells of the grid"
    write_svg(FOLDER / "grid.svg", 980, 400, title, shapes)


def _grid_cells(left: float, top: float) -> list[str]:
    """Returns the table of n by g, with s = n * g in every cell of the study."""
    width, height = 38, 24
    columns = (1, 2, 4, 8, 16, 32, 64)
    shapes = heading(left + 3.5 * width, "the grid of the study", "s = n g in every cell")
    for column, k in enumerate(columns):
        g = "1" if k == 1 else f"1/{k}"
        shapes.append(label(left + (column + 0.5) * width, top - 10, g, 11.5, **MIDDLE))
    shapes.append(label(left - 10, top - 10, "n \\ g", 11.5, MUTED, **END))
    for row in range(10):
        experts = 2 ** (row + 1)
        y = top + row * height
        shapes.append(label(left - 10, y + 16, str(experts), 11.5, **END))
        for column, k in enumerate(columns):
            s = experts / k
            x = left + column * width
            if 1 <= s <= 128:
                color = BLUE if s == 8 else PALE
                shapes.append(rectangle(x, y, width - 2, height - 2, color, rx="2"))
                text = WHITE if s == 8 else TEXT
                shapes.append(label(x + width / 2 - 1, y + 15, f"{s:g}", 11.5, text, **MIDDLE))
    note = "A diagonal has one s. k = 1/g."
    shapes.append(label(left + 3.5 * width, 366, note, 12, MUTED, **MIDDLE))
    return shapes


def draw_pools() -> None:
    """Draws two pools with a router each, and one router over the same experts."""
    shapes = _pool_panel(
        40, "two pools", "moe.pools = ((4, 240, 1), (8, 120, 2)); a softmax and a top-k each", True
    )
    shapes += _pool_panel(
        520, "one router over all widths", "moe.widths: 4 × 240 and 8 × 120; moe.top_k = 3", False
    )
    shapes.append(line([(490, 30), (490, 300)], "#d1d9e0"))
    title = "Pools: two routers on one flat axis, and one router over experts of two widths"
    write_svg(FOLDER / "pools.svg", 980, 330, title, shapes)


def _pool_panel(left: float, name: str, detail: str, has_pools: bool) -> list[str]:
    widths = [50.0] * 4 + [25.0] * 8
    starts = [left + sum(widths[:expert]) for expert in range(12)]
    shapes = heading(left + 200, name, detail)
    token_x = left + 200
    shapes.append(box(token_x - 40, 76, 80, 24, "token x"))
    if has_pools:
        groups = (
            (0, 200, (2,), BLUE, "router 1, k = 1"),
            (200, 200, (5, 10), ORANGE, "router 2, k = 2"),
        )
    else:
        groups = ((0, 400, (1, 6, 9), VIOLET, "router, k = 3"),)
    for offset, width, chosen, color, text in groups:
        x = left + offset + width / 2
        shapes.append(arrow([(token_x, 100), (token_x, 112), (x, 112), (x, 128)]))
        shapes.append(box(left + offset + 20, 128, width - 40, 26, text, color))
        for expert in chosen:
            center = starts[expert] + widths[expert] / 2
            shapes.append(curve_down(x, 154, center - 1, 192, color))
        for expert, start in enumerate(starts):
            if offset <= start - left < offset + width:
                fill = color if expert in chosen else PALE
                shapes.append(rectangle(start, 192, widths[expert] - 2, 26, fill))
    shapes.append(
        label(token_x, 238, "one flat axis, one dispatch, one grouped matmul", 12, MUTED, **MIDDLE)
    )
    if has_pools:
        formula = "y = (k₁ y₁ + k₂ y₂) / (k₁ + k₂), here (1 y₁ + 2 y₂) / 3"
    else:
        formula = "y = sum of gate × expert, as in MoDSE"
    shapes.append(label(token_x, 272, formula, 14, **MIDDLE))
    note = "each pool has its own losses" if has_pools else "the router chooses the mix of widths"
    shapes.append(label(token_x, 296, note, 12, MUTED, **MIDDLE))
    return shapes


def curve_down(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    """Returns a curve from top to bottom."""
    middle = (y1 + y2) / 2
    return (
        f'<path d="M{x1:g} {y1:g} C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {y2:g}" '
        f'fill="none" stroke="{color}" stroke-width="1.6"/>'
    )


def draw_widths() -> None:
    """Draws distributions of widths with one total: equal, pairs, free, zero and copy experts."""
    rows = (
        ("equal", "moe.width", [80] * 8),
        ("pairs", "moe.pairs; a color adds to 160", [144, 16, 128, 32, 96, 64, 80, 80]),
        ("any widths", "moe.widths", [200, 136, 104, 72, 56, 40, 24, 8]),
        ("zero and copy", "widths of 0, moe.copy_experts", [107, 107, 107, 107, 106, 106, 0, 0]),
    )
    shapes = heading(490, "eight experts of one total width", "the flat hidden axis of a layer")
    left = 240
    for row, (name, option, widths) in enumerate(rows):
        y = 84 + 58 * row
        shapes.append(label(left - 20, y + 12, name, 13.5, **END, **BOLD))
        shapes.append(label(left - 20, y + 28, option, 11.5, MUTED, **END))
        x = float(left)
        for expert, width in enumerate(widths):
            color = COLORS[(expert // 2) % 4] if name == "pairs" else BLUE
            if width:
                shapes.append(rectangle(x, y, width - 2, 30, color))
            if width > 12:
                size = 12 if width > 20 else 9.5
                center = x + width / 2 - 1
                shapes.append(label(center, y + 20, str(width), size, WHITE, **MIDDLE, **BOLD))
            x += width
        if name == "zero and copy":
            shapes += _width_zero_experts(x, y)
    note = (
        "Experts of width 0 return 0, or x (copy experts). They have no parameters and no FLOPs; "
        "the router and the losses cover them."
    )
    shapes.append(label(490, 328, note, 12.5, MUTED, **MIDDLE))
    title = "Widths: equal, in pairs, any, and experts of width zero that return 0 or their input"
    write_svg(FOLDER / "widths.svg", 980, 350, title, shapes)


def _width_zero_experts(x: float, y: float) -> list[str]:
    shapes = []
    for text in ("0", "x"):
        dashes = {"stroke": ORANGE, "stroke_dasharray": "3 2"}
        shapes.append(rectangle(x + 2, y, 20, 30, WHITE, **dashes))
        shapes.append(label(x + 12, y + 20, text, 13, TEXT, **MIDDLE, **BOLD))
        x += 26
    return shapes


class Flow:
    """A diagram of a block that grows downward along a vertical line."""

    def __init__(self, x: float, y: float) -> None:
        self.x, self.y = x, y
        self.shapes: list[str] = [label(x, y - 6, "x", 14, **MIDDLE, **BOLD)]

    def step(self, text: str, color: str = PALE, offset: float = 0, width: float = 86) -> None:
        """Adds a box below an arrow."""
        x = self.x + offset
        self.shapes.append(arrow([(x, self.y), (x, self.y + 16)]))
        self.shapes.append(box(x - width / 2, self.y + 16, width, 22, text, color))
        self.y += 38

    def add(self, start_y: float, offset: float = -58) -> None:
        """Adds a sum with the stream at start_y, which passes by on the left."""
        x = self.x + offset
        self.shapes.append(line([(self.x, start_y), (x, start_y), (x, self.y + 24)]))
        self.shapes.append(arrow([(x, self.y + 24), (self.x - 9, self.y + 24)]))
        self.shapes.append(arrow([(self.x, self.y), (self.x, self.y + 15)]))
        self.plus()

    def plus(self) -> None:
        """Adds a circle with a plus, into which arrows lead."""
        y = self.y + 24
        self.shapes.append(
            f'<circle cx="{self.x:g}" cy="{y:g}" r="9" fill="{WHITE}" stroke="{NEUTRAL}"/>'
        )
        self.shapes.append(label(self.x, y + 4.5, "+", 14, **MIDDLE))
        self.y += 33

    def gap(self, length: float) -> float:
        """Adds a piece of line and returns the position of its middle, for a branch."""
        self.shapes.append(line([(self.x, self.y), (self.x, self.y + length)]))
        self.y += length
        return self.y - length / 2


def draw_blocks() -> None:
    """Draws the blocks: pre and post norms, dense, and a shared expert at its two places."""
    panels = (
        ("pre norms", "norm_position = pre", _pre_block),
        ("post norms, dense", "dense_width = 960", _dense_block),
        ("post norms, MoE", "norm_position = post", _post_block),
        ("shared, in layer", "shared_placement = in_layer", _in_layer_block),
        ("shared, parallel", "shared_placement = parallel", _parallel_block),
    )
    shapes: list[str] = []
    for column, (name, option, draw) in enumerate(panels):
        x = 100 + 192 * column
        shapes += heading(x + 6, name, option)
        shapes += draw(x)
    note = (
        "N: RMSNorm. QK-norm (model.qk_norm = full) normalizes queries and keys inside attention."
    )
    shapes.append(label(490, 452, note, 12.5, MUTED, **MIDDLE))
    title = "Blocks: norms before or after, a dense FFN, a shared expert in the layer or parallel"
    write_svg(FOLDER / "blocks.svg", 980, 474, title, shapes)


def _pre_block(x: float) -> list[str]:
    flow = Flow(x, 92)
    for name, color in (("attention", PALE), ("MoE", BLUE)):
        start = flow.gap(14)
        flow.step("N")
        flow.step(name, color)
        flow.add(start)
    return _finish(flow)


def _attend_before_norm(flow: Flow, width: float = 86) -> None:
    """Adds h = x + N(attention(x))."""
    start = flow.gap(14)
    flow.step("attention", width=width)
    flow.step("N", width=width)
    flow.add(start)


def _post_block(x: float, name: str = "MoE", color: str = BLUE) -> list[str]:
    flow = Flow(x, 92)
    _attend_before_norm(flow)
    start = flow.gap(14)
    flow.step(name, color)
    flow.step("N")
    flow.add(start)
    return _finish(flow)


def _dense_block(x: float) -> list[str]:
    return _post_block(x, "dense FFN", GREEN)


def _in_layer_block(x: float) -> list[str]:
    flow = Flow(x, 92)
    _attend_before_norm(flow)
    start = flow.gap(14)
    flow.shapes.append(arrow([(x, flow.y), (x + 54, flow.y), (x + 54, flow.y + 16)]))
    flow.shapes.append(box(x + 24, flow.y + 16, 60, 22, "shared", ORANGE))
    flow.step("MoE", BLUE, width=44)
    flow.shapes.append(line([(x + 54, flow.y), (x + 54, flow.y + 24)]))
    flow.shapes.append(arrow([(x + 54, flow.y + 24), (x + 9, flow.y + 24)]))
    flow.shapes.append(arrow([(x, flow.y), (x, flow.y + 15)]))
    flow.plus()
    flow.step("N")
    flow.add(start)
    return _finish(flow)


def _parallel_block(x: float) -> list[str]:
    flow = Flow(x, 92)
    right = x + 70
    flow.shapes.append(arrow([(x, 97), (right, 97), (right, 152)]))
    flow.shapes.append(box(right - 24, 152, 48, 22, "MoE", BLUE))
    flow.shapes.append(arrow([(right, 174), (right, 206)]))
    flow.shapes.append(box(right - 24, 206, 48, 22, "N"))
    _attend_before_norm(flow, width=66)
    start = flow.gap(14)
    flow.step("shared", ORANGE, width=66)
    flow.step("N", width=66)
    flow.shapes.append(line([(right, 228), (right, flow.y + 24)]))
    flow.shapes.append(arrow([(right, flow.y + 24), (x + 9, flow.y + 24)]))
    flow.add(start)
    return _finish(flow)


def _finish(flow: Flow) -> list[str]:
    flow.shapes.append(arrow([(flow.x, flow.y), (flow.x, flow.y + 18)]))
    flow.shapes.append(label(flow.x, flow.y + 34, "y", 14, **MIDDLE, **BOLD))
    return flow.shapes


LOGITS = (1.2, 0.1, 2.0, -0.6, 0.7, -1.1)


def compute_gates(gate: str, scale: float = 1.0) -> list[float]:
    """Returns the gates of the two largest logits; 0 for the others."""
    chosen = sorted(range(len(LOGITS)), key=lambda e: -LOGITS[e])[:2]
    exponentials = [math.exp(logit) for logit in LOGITS]
    softmax = [value / sum(exponentials) for value in exponentials]
    sigmoid = [1 / (1 + math.exp(-logit)) for logit in LOGITS]
    scores = {"uniform": [0.5] * len(LOGITS)}.get(gate, sigmoid if "sigmoid" in gate else softmax)
    kept = [scores[e] if e in chosen else 0.0 for e in range(len(LOGITS))]
    if gate == "top_k_softmax" or gate.endswith("renormalized"):
        kept = [value / sum(kept) for value in kept]
    return [scale * value for value in kept]


def draw_gates() -> None:
    """Draws the gates of one token for every value of moe.gate."""
    gates = (
        ("softmax_top_k", "Slicing and Dicing, OLMoE"),
        ("softmax_top_k_renormalized", "Qwen"),
        ("top_k_softmax", "MoDSE, Mixtral"),
        ("sigmoid", "of each logit alone"),
        ("sigmoid_renormalized", "DeepSeek-V3, gate_scale = 2.5"),
        ("uniform", "1/k, the control of s = 1"),
    )
    shapes: list[str] = []
    for panel, (gate, source) in enumerate(gates):
        left, top = 40 + 320 * (panel % 3), 24 + 196 * (panel // 3)
        scale = 2.5 if "gate_scale" in source else 1.0
        values = compute_gates(gate, scale)
        shapes += heading(left + 130, gate, source, top + 10)
        base = top + 150
        for expert, value in enumerate(values):
            x = left + 44 * expert
            height = 80 * value / scale
            color = BLUE if value else PALE
            shapes.append(rectangle(x, base - max(height, 2), 34, max(height, 2), color))
            if value:
                shapes.append(label(x + 17, base - height - 5, f"{value:.2f}", 12, **MIDDLE))
            shapes.append(label(x + 17, base + 15, f"{LOGITS[expert]:g}", 11, MUTED, **MIDDLE))
        shapes.append(label(left + 264, base - 60, f"sum {sum(values):.2f}", 12, MUTED, **END))
    note = "One token, six experts, k = 2. Below each expert: its logit."
    shapes.append(label(490, 418, note, 12.5, MUTED, **MIDDLE))
    title = "Gates: the weights of the two chosen experts under every value of moe.gate"
    write_svg(FOLDER / "gates.svg", 980, 440, title, shapes)


CHOICES = ((1, 0), (1, 0), (2, 0), (0, 1), (0, 3), (0, 2))  # first and second expert of six tokens


def serve(order: str, capacity: int) -> tuple[list[list[tuple[int, int]]], list[tuple[int, int]]]:
    """Returns the (token, choice) pairs that every expert takes, and those that are dropped."""
    pairs = [(token, choice) for token in range(len(CHOICES)) for choice in range(2)]
    if order == "choice":
        pairs.sort(key=lambda pair: pair[1])
    taken: list[list[tuple[int, int]]] = [[], [], [], []]
    dropped = []
    for token, choice in pairs:
        expert = CHOICES[token][choice]
        if len(taken[expert]) < capacity:
            taken[expert].append((token, choice))
        else:
            dropped.append((token, choice))
    return taken, dropped


def draw_capacity() -> None:
    """Draws which routed tokens an expert drops, in both orders."""
    capacity = len(CHOICES) * 2 // 4
    shapes: list[str] = []
    details = {"choice": "all first choices, then all second (GShard)", "token": "token by token"}
    for panel, (order, detail) in enumerate(details.items()):
        left = 60 + 480 * panel
        shapes += heading(left + 190, f"capacity_order = {order}", detail)
        taken, dropped = serve(order, capacity)
        for expert, pairs in enumerate(taken):
            x = left + 100 * expert
            shapes.append(label(x + 40, 82, f"expert {expert}", 12.5, **MIDDLE))
            for slot in range(capacity):
                y = 92 + 30 * slot
                shapes.append(rectangle(x, y, 80, 26, WHITE, stroke=NEUTRAL))
                if slot < len(pairs):
                    shapes.append(_routed_token(x, y, pairs[slot], BLUE, WHITE))
            lost = [pair for pair in dropped if CHOICES[pair[0]][pair[1]] == expert]
            for slot, pair in enumerate(lost):
                y = 192 + 30 * slot
                shapes.append(_routed_token(x, y, pair, WHITE, ORANGE))
                shapes.append(line([(x + 6, y + 13), (x + 74, y + 13)], ORANGE))
        shapes.append(label(left + 100, 208, "dropped", 12.5, ORANGE))
    note = (
        "Six tokens, four experts, k = 2, factor 1: capacity = 1 × 6 × 2 / 4 = 3. "
        "t3.1: first choice of token 3."
    )
    shapes.append(label(490, 306, note, 12.5, MUTED, **MIDDLE))
    title = "Capacity: which routed tokens a full expert drops, by the order of serving"
    write_svg(FOLDER / "capacity.svg", 980, 328, title, shapes)


def _routed_token(x: float, y: float, pair: tuple[int, int], fill: str, color: str) -> str:
    token, choice = pair
    return rectangle(x + 3, y + 3, 74, 20, fill, rx="2") + label(
        x + 40, y + 17.5, f"t{token}.{choice + 1}", 12.5, color, **MIDDLE
    )


def draw_balance() -> None:
    """Draws the scopes of the load-balancing loss."""
    scopes = (
        ("batch", "the micro-batch of all devices", ((0, 0, 2, 4),)),
        ("device", "each device's share", ((0, 0, 1, 4), (1, 0, 1, 4))),
        ("sequence", "each sequence", tuple((d, s, 1, 1) for d in range(2) for s in range(4))),
    )
    shapes: list[str] = []
    for panel, (scope, detail, groups) in enumerate(scopes):
        left, top = 50 + 310 * panel, 92
        shapes += heading(left + 130, f"balance_loss_scope = {scope}", detail)
        for device in range(2):
            x = left + 132 * device
            shapes.append(label(x + 62, top - 6, f"device {device}", 12, MUTED, **MIDDLE))
            for sequence in range(4):
                for token in range(5):
                    shapes.append(
                        rectangle(x + 9 + 22 * token, top + 10 + 32 * sequence, 18, 16, PALE)
                    )
        for device, sequence, width, height in groups:
            shapes.append(
                rectangle(
                    left + 132 * device + 2,
                    top + 32 * sequence + 3,
                    132 * width - 12,
                    32 * height - 4,
                    "none",
                    rx="5",
                    stroke=BLUE,
                    stroke_width="2.4",
                )
            )
    note = (
        "Each outline is a set of tokens in which the experts should be used evenly. "
        "The losses of the sets are averaged."
    )
    shapes.append(label(490, 258, note, 12.5, MUTED, **MIDDLE))
    title = "Scope of the load-balancing loss: batch, device or sequence"
    write_svg(FOLDER / "balance.svg", 980, 280, title, shapes)


COUNTS = (150, 30, 96, 64, 120, 20)


def draw_bias() -> None:
    """Draws the loss-free bias: the load of a step, and the update by both rules."""
    mean = sum(COUNTS) / len(COUNTS)
    shapes = heading(170, "load of a step", "tokens per expert, c; the line is the mean")
    base = 230
    for expert, count in enumerate(COUNTS):
        x = 50 + 42 * expert
        color = ORANGE if count > mean else BLUE
        shapes.append(rectangle(x, base - count, 32, count, color))
        shapes.append(label(x + 16, base + 16, str(count), 11.5, MUTED, **MIDDLE))
    shapes.append(line([(42, base - mean), (304, base - mean)], TEXT, stroke_dasharray="5 3"))
    rules = (
        (
            "bias_rule = sign",
            "b += rate × sign(mean − c)",
            lambda c: 34 * math.copysign(1, mean - c),
        ),
        (
            "bias_rule = proportional",
            "b += rate × (mean − c) / mean",
            lambda c: 60 * (mean - c) / mean,
        ),
    )
    for panel, (name, detail, update) in enumerate(rules):
        left = 380 + 300 * panel
        shapes += heading(left + 125, name, detail)
        shapes.append(line([(left - 8, 150), (left + 254, 150)]))
        for expert, count in enumerate(COUNTS):
            x = left + 16 + 42 * expert
            step = update(count)
            color = ORANGE if count > mean else BLUE
            neck = 150 - step + math.copysign(6, step)
            shapes.append(line([(x, 150), (x, neck)], color, stroke_width="4"))
            shapes.append(arrow([(x, 150), (x, 150 - step)], color))
    note = (
        "The bias is added to the scores that experts are chosen by, and not to the gates. "
        "It has no gradient."
    )
    shapes.append(label(490, 284, note, 12.5, MUTED, **MIDDLE))
    title = "Loss-free balancing: the bias of crowded experts falls, that of idle ones rises"
    write_svg(FOLDER / "bias.svg", 980, 306, title, shapes)


def main() -> None:
    for draw in (
        draw_grid,
        draw_pools,
        draw_widths,
        draw_blocks,
        draw_gates,
        draw_capacity,
        draw_balance,
        draw_bias,
    ):
        draw()


if __name__ == "__main__":
    main()
