"""Every arm of the study Slicing and Dicing as a config: sizes, grid, pools, shared experts.

An arm is one choice of the layer at one size of the model. Arms of a size share the recipe, the
number of tokens and, up to the router, the FLOPs of the dense arm: the widths that a token uses sum
to the width of the dense FFN. `moe.flop_matched_width` states it; the config checks it exactly.

    config = arms.build_mixture("50M", 32, Fraction(1, 4))
    config = arms.limit_capacity(config, 1.2)

The functions `*_options` return the options alone, for configs with sizes or a recipe of their own.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from modse_jax.config.loading import override_options
from modse_jax.config.options import Config
from modse_jax.errors import UserError
from modse_jax.study import recipe

TOKENS_PER_PARAMETER = 20  # training tokens per active parameter, by the nominal name
DENSE_RATIO = 4  # width of the dense FFN over the model width


class Size(NamedTuple):
    """A size of the model.

    Attributes:
        name: its name; in the study, the nominal number of active parameters, both embeddings
            included.
        active_parameters: the number that decides how many tokens a model of this size trains on.
        dim: model width.
        num_layers: number of decoder blocks.
        num_heads: number of attention heads.
        vocab_size: rows of each embedding.
    """

    name: str
    active_parameters: int
    dim: int
    num_layers: int
    num_heads: int
    vocab_size: int = recipe.VOCABULARY

    @property
    def dense_width(self) -> int:
        """Returns the width of the dense FFN."""
        return DENSE_RATIO * self.dim

    @property
    def tokens(self) -> int:
        """Returns the number of training tokens."""
        return TOKENS_PER_PARAMETER * self.active_parameters


# The seven sizes of the paper.
STUDY_SIZES = (
    Size("10M", 10_000_000, dim=48, num_layers=3, num_heads=3),
    Size("20M", 20_000_000, dim=96, num_layers=4, num_heads=4),
    Size("50M", 50_000_000, dim=240, num_layers=5, num_heads=6),
    Size("80M", 80_000_000, dim=336, num_layers=8, num_heads=7),
    Size("110M", 110_000_000, dim=432, num_layers=9, num_heads=9),
    Size("200M", 200_000_000, dim=640, num_layers=10, num_heads=10),
    Size("300M", 300_000_000, dim=832, num_layers=12, num_heads=13),
)

# Sizes of the study's code that the paper does not show.
OTHER_SIZES = (
    Size("100M", 100_000_000, dim=384, num_layers=9, num_heads=8),
    Size("500M", 500_000_000, dim=1120, num_layers=14, num_heads=14),
)

SIZES = {size.name: size for size in (*STUDY_SIZES, *OTHER_SIZES)}

# The axes of the grid.
GRANULARITIES = tuple(Fraction(1, k) for k in (1, 2, 4, 8, 16, 32, 64))
SPARSITIES = (1, 2, 4, 8, 16, 32, 64, 128)
FEWEST_EXPERTS, MOST_EXPERTS = 2, 1024


class PoolOfArm(NamedTuple):
    """A pool of experts of one width.

    Attributes:
        experts: number of experts, n.
        granularity: expert width over dense width, g.
        active: experts per token, k.
    """

    experts: int
    granularity: Fraction
    active: int


class GridCell(NamedTuple):
    """A cell of the grid: n experts of granularity g, of which a token uses k = 1 / g."""

    size: Size
    experts: int
    granularity: Fraction

    @property
    def name(self) -> str:
        """Returns a name that works as a file name, such as "50M_n32_k4"."""
        return f"{self.size.name}_n{self.experts}_k{1 / self.granularity}"


def find_size(name: str) -> Size:
    """Returns the size of a name.

    Raises:
        UserError: there is none; the message has the closest name.
    """
    if name in SIZES:
        return SIZES[name]
    close = difflib.get_close_matches(name.upper(), SIZES, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(f"unknown size {name!r}; {hint}known sizes: {', '.join(SIZES)}")


def build_dense(size: str | Size) -> Config:
    """Returns the dense arm: a SwiGLU FFN in place of the mixture, without a router."""
    size = _as_size(size)
    return _build(size, dense_options(size))


def build_mixture(size: str | Size, num_experts: int, granularity: Fraction) -> Config:
    """Returns an arm of the grid: n experts of granularity g, of which k = 1 / g are active.

    Raises:
        UserError: 1 / g, or a width, is not an integer, or there are fewer than k experts.
    """
    size = _as_size(size)
    return _build(size, mixture_options(size, num_experts, granularity))


def build_slices(size: str | Size, granularity: Fraction, gate: str = "uniform") -> Config:
    """Returns an arm with s = 1: the dense FFN cut into 1 / g experts that are always active.

    Args:
        size: the size of the model.
        granularity: expert width over dense width, g.
        gate: "uniform" weights each with 1 / k; "softmax_top_k" trains the router.
    """
    config = build_mixture(size, _whole("1 / g", 1 / granularity), granularity)
    return override_options(config, {"moe.gate": gate})


def build_shared(
    size: str | Size,
    num_experts: int,
    granularity: Fraction,
    shared_granularity: Fraction,
    placement: str,
) -> Config:
    """Returns an arm with a shared expert, which the study calls generalist.

    See `shared_options` for the arguments.
    """
    size = _as_size(size)
    return _build(
        size, shared_options(size, num_experts, granularity, shared_granularity, placement)
    )


def build_pools(
    size: str | Size,
    pools: Sequence[PoolOfArm],
    shared_granularity: Fraction = Fraction(0),
    placement: str = "none",
) -> Config:
    """Returns an arm with one or more pools, each with its own router, and any shared expert.

    Raises:
        UserError: the active widths do not sum to the dense width, or a width is not an integer.
    """
    size = _as_size(size)
    return _build(size, pools_options(size, pools, shared_granularity, placement))


def size_options(size: Size, tokens_per_step: int) -> dict[str, Any]:
    """Returns the options that a size decides: those of the model, and the number of steps.

    Args:
        size: the size of the model.
        tokens_per_step: batch size x sequence length.
    """
    return {
        "model.dim": size.dim,
        "model.num_layers": size.num_layers,
        "model.num_heads": size.num_heads,
        "model.vocab_size": size.vocab_size,
        "moe.flop_matched_width": size.dense_width,
        "training.steps": -(-size.tokens // tokens_per_step),
    }


def dense_options(size: Size) -> dict[str, Any]:
    """Returns the options of the dense FFN."""
    return {"model.dense_width": size.dense_width}


def mixture_options(size: Size, num_experts: int, granularity: Fraction) -> dict[str, Any]:
    """Returns the options of the layer of `build_mixture`."""
    return shared_options(size, num_experts, granularity, Fraction(0), "none")


def shared_options(
    size: Size,
    num_experts: int,
    granularity: Fraction,
    shared_granularity: Fraction,
    placement: str,
) -> dict[str, Any]:
    """Returns the options of a layer with a shared expert.

    The number of active routed experts is (1 - shared_granularity) / granularity.

    Args:
        size: the size of the model.
        num_experts: routed experts, n.
        granularity: width of a routed expert over dense width, g.
        shared_granularity: width of the shared expert over dense width.
        placement: "in_layer" or "parallel", which the study's code uses; "none" without one.

    Raises:
        UserError: the number of active experts, or a width, is not an integer.
    """
    active = _whole("k = (1 - g_shared) / g", (1 - shared_granularity) / granularity)
    pool = PoolOfArm(num_experts, granularity, active)
    return pools_options(size, (pool,), shared_granularity, placement)


def pools_options(
    size: Size,
    pools: Sequence[PoolOfArm],
    shared_granularity: Fraction = Fraction(0),
    placement: str = "none",
) -> dict[str, Any]:
    """Returns the options of the layer of `build_pools`.

    Raises:
        UserError: a width is not an integer.
    """
    options: dict[str, Any] = {
        "moe.shared_width": _width(size, shared_granularity),
        "moe.shared_placement": placement,
    }
    if len(pools) == 1:
        pool = pools[0]
        options["moe.num_experts"] = pool.experts
        options["moe.width"] = _width(size, pool.granularity)
        options["moe.top_k"] = pool.active
    else:
        options["moe.pools"] = tuple(
            (pool.experts, _width(size, pool.granularity), pool.active) for pool in pools
        )
    return options


def limit_capacity(config: Config, factor: float, evaluation_factor: float = 0.0) -> Config:
    """Returns an arm with a capacity limit; the study's is 1.2, in training and in evaluation.

    Args:
        config: the arm.
        factor: `moe.capacity_factor`, for training.
        evaluation_factor: `evaluation.capacity_factor`; 0 = dropless.
    """
    return override_options(
        config,
        {
            "moe.capacity_factor": factor,
            "moe.capacity_order": "token",
            "evaluation.capacity_factor": evaluation_factor,
        },
    )


def set_balancing(config: Config, balance_loss_weight: float, bias_rate: float) -> Config:
    """Returns an arm with another weight of the load-balancing loss and a loss-free bias.

    The study crosses the weights 1e-2 and 1e-4 with the rates 0 and 1e-3.

    Args:
        config: the arm.
        balance_loss_weight: `moe.balance_loss_weight`, alpha.
        bias_rate: step of the sign rule, gamma; 0 = no bias.
    """
    options: dict[str, Any] = {"moe.balance_loss_weight": balance_loss_weight}
    if bias_rate:
        options |= {"moe.bias_rule": "sign", "moe.bias_rate": bias_rate}
    else:
        options |= {"moe.bias_rule": "none"}
    return override_options(config, options)


def list_grid(sizes: Sequence[Size] = STUDY_SIZES) -> list[GridCell]:
    """Returns all arms (n experts, width g) of the main grid: 49 per model size, 343 in total."""
    return [
        GridCell(size, int(sparsity / granularity), granularity)
        for size in sizes
        for granularity in GRANULARITIES
        for sparsity in SPARSITIES
        if FEWEST_EXPERTS <= sparsity / granularity <= MOST_EXPERTS
    ]


def build_grid(sizes: Sequence[Size] = STUDY_SIZES) -> Iterator[tuple[str, Config]]:
    """Yields the name and the config of the dense arm and of every cell of the grid, by size."""
    for size in sizes:
        yield f"{size.name}_dense", build_dense(size)
        for cell in list_grid((size,)):
            yield cell.name, build_mixture(size, cell.experts, cell.granularity)


def _as_size(size: str | Size) -> Size:
    return find_size(size) if isinstance(size, str) else size


def _build(size: Size, options: Mapping[str, Any]) -> Config:
    """Returns the config of a size with the recipe and the options of an arm."""
    values = recipe.recipe_options()
    tokens_per_step = values["training.batch_size"] * values["data.sequence_length"]
    values |= size_options(size, tokens_per_step)
    return override_options(Config(), {**values, **options})


def _width(size: Size, granularity: Fraction) -> int:
    """Returns the hidden units of a granularity, which may be a float: 0.25 is exactly 1/4."""
    width = Fraction(granularity) * size.dense_width
    if width.denominator != 1:
        raise UserError(
            f"granularity {granularity} of the dense width {size.dense_width} of size {size.name} "
            f"is {width} hidden units; choose a granularity that gives a whole number"
        )
    return int(width)


def _whole(name: str, value: Fraction) -> int:
    """Returns a fraction that is an integer as an int."""
    value = Fraction(value)
    if value.denominator != 1 or value < 1:
        raise UserError(
            f"{name} = {value} must be a whole number of at least 1; then k * g = 1 can hold"
        )
    return int(value)
