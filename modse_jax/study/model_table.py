"""The table of a model that is printed before every run: parameters, FLOPs, layer and symbols."""

from collections.abc import Sequence
from fractions import Fraction

from modse_jax.config.options import Config
from modse_jax.model import accounting
from modse_jax.study import notation

WIDTHS_SHOWN = 16  # most expert widths that the table lists for a pool


def format_model_table(config: Config) -> str:
    """Returns the parameters, the FLOPs, the layer and its symbols as lines of text."""
    lines = [*_parameter_lines(config), _flops_line(config), _layer_line(config)]
    shape = notation.from_config(config)
    if shape is not None:
        lines += _symbol_lines(config, shape)
    return "\n".join(lines)


def _parameter_lines(config: Config) -> list[str]:
    """Returns a line for every part of the model that has parameters."""
    counts = accounting.count_parameters(config)
    active = accounting.count_active_parameters(config)
    lines = [f"{'parameters':14} {'all':>15} {'active':>15}"]
    for name, count in counts._asdict().items():
        if count:
            lines.append(f"  {name:12} {count:>15,} {getattr(active, name):>15,}")
    lines.append(f"  {'total':12} {counts.total:>15,} {active.total:>15,}")
    weights = f"  {'weights':12} {counts.weights:>15,} {active.weights:>15,}"
    lines.append(f"{weights}  without router and norms")
    return lines


def _flops_line(config: Config) -> str:
    length = config.data.sequence_length
    nominal = accounting.nominal_flops_per_token(config, length)
    olmo = accounting.olmo_flops_per_token(config, length)
    return (
        f"FLOPs per token: {nominal:,} in training, if experts are equally loaded (OLMo-core's "
        f"count: {olmo:,})"
    )


def _layer_line(config: Config) -> str:
    """Returns the experts of a layer, such as "layer: 32 experts of width 240, top-4"."""
    if config.is_dense:
        return f"layer: dense FFN of width {config.model.dense_width}"
    parts = []
    first = 0
    for pool in config.pools:
        widths = config.widths[first : first + pool.num_experts]
        first += pool.num_experts
        parts.append(f"{pool.num_experts} experts of {_list_widths(widths)}, top-{pool.top_k}")
    if config.moe.shared_width:
        placement = config.moe.shared_placement
        parts.append(f"shared expert of width {config.moe.shared_width}, {placement}")
    return f"layer: {'; '.join(parts)}"


def _list_widths(widths: Sequence[int]) -> str:
    if len(set(widths)) == 1:
        return f"width {widths[0]}"
    ellipsis = " ..." if len(widths) > WIDTHS_SHOWN else ""
    return f"widths {', '.join(map(str, widths[:WIDTHS_SHOWN]))}{ellipsis}"


def _symbol_lines(config: Config, shape: notation.LayerShape) -> list[str]:
    """Returns the symbols of every paper, and the dense FFN that they are relative to."""
    dense = _format(notation.reference_width(config))
    if config.moe.flop_matched_width:
        match = "k * g = 1" if len(shape.pools) == 1 and not shape.shared else _sum_up(shape)
        reference = f"relative to the dense FFN of width {dense}, whose FLOPs match: {match}"
    else:
        reference = f"relative to a dense FFN of width {dense}, the same as a token's experts"
    by_paper: dict[str, list[str]] = {}
    for symbol in shape.symbols():
        by_paper.setdefault(symbol.paper, []).append(f"{symbol.name} {_format(symbol.value)}")
    lines = [f"  {paper:20} {', '.join(symbols)}" for paper, symbols in by_paper.items()]
    return [reference, *lines]


def _sum_up(shape: notation.LayerShape) -> str:
    """Returns the sum of the active widths over the dense width, such as "2 * 1/4 + 1/2 = 1"."""
    terms = [f"{pool.active} * {_format(pool.granularity)}" for pool in shape.pools]
    if shape.shared:
        terms.append(_format(shape.shared))
    return f"{' + '.join(terms)} = {_format(shape.active_ratio)}"


def _format(value: Fraction) -> str:
    """Returns a fraction as text; as a rounded decimal if its denominator is long."""
    return str(value) if value.denominator < 10_000 else f"{float(value):.6g}"
