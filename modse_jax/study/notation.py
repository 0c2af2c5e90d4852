"""The symbols s, g, k, E, G and A of the scaling studies of mixtures of experts, and conversions.

The papers use one letter for different things, and different letters for one thing:

    symbol  paper                   definition
    n       Slicing and Dicing      routed experts per layer
    k       Slicing and Dicing      routed experts per token
    g       Slicing and Dicing      expert width over dense width; at most 1, smaller is finer
    s       Slicing and Dicing      expert parameters of a layer over those of the dense FFN
    E       Krajewski, joint law    the same ratio, called expansion rate
    G       Krajewski               dense width over expert width, 1 / g
    E       Ling                    routed experts per layer, n
    G       Ling                    2 * model width over expert width
    A       Ling                    experts that a token uses over all experts, shared ones included
    G       Tencent                 experts per token
    S       Tencent                 shared experts over the experts that a token uses

"Dense" is the dense FFN that a token's experts replace: it needs the same FLOPs if k * g = 1, or
with pools and a shared expert, if the sum of k_i * g_i plus the shared width is the dense width.

The papers other than Slicing and Dicing define their symbols for experts of one width. Here g is
the mean width of the experts that a token uses, if the experts of a pool receive equally many
tokens; ratios of numbers of experts become ratios of widths. Both give the papers' values for one
width.

All values are exact fractions, so that k * g = 1 is never a question of rounding.

Sources: Slicing and Dicing (arXiv 2605.11689); Krajewski et al. (2402.07871); joint law:
Ludziejewski et al. (2502.05172); Ling (2507.17702); Tencent (2509.23678).
"""

import dataclasses
from fractions import Fraction
from typing import NamedTuple

from modse_jax.config.options import Config


class PoolShape(NamedTuple):
    """A pool of experts that share a router.

    Attributes:
        experts: number of experts, n.
        active: experts per token, k.
        granularity: mean width of the experts over the dense width, g.
    """

    experts: int
    active: int
    granularity: Fraction


class Symbol(NamedTuple):
    """One symbol of one paper for a layer.

    Attributes:
        name: the letter, such as "G".
        paper: who defines it.
        value: its exact value.
    """

    name: str
    paper: str
    value: Fraction


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """The shape of a mixture-of-experts layer relative to a dense FFN.

    Attributes:
        pools: the pools of routed experts, at least one.
        shared: width of the shared expert over the dense width; 0 without one.
        dense_over_dim: dense width over model width; 4 in Slicing and Dicing.
    """

    pools: tuple[PoolShape, ...]
    shared: Fraction = Fraction(0)
    dense_over_dim: Fraction = Fraction(4)

    @property
    def experts(self) -> int:
        """Returns n, the routed experts of all pools."""
        return sum(pool.experts for pool in self.pools)

    @property
    def active(self) -> int:
        """Returns k, the routed experts per token over all pools."""
        return sum(pool.active for pool in self.pools)

    @property
    def active_ratio(self) -> Fraction:
        """Returns the sum of k_i * g_i plus the shared width: 1 if the FLOPs are those of dense."""
        return self.shared + sum(pool.active * pool.granularity for pool in self.pools)

    @property
    def sparsity(self) -> Fraction:
        """Returns s, the expert parameters over those of the dense FFN, the shared one included.

        Slicing and Dicing divides by the active parameters, which is the same if the FLOPs match.
        """
        return self.shared + sum(pool.experts * pool.granularity for pool in self.pools)

    @property
    def granularity(self) -> Fraction:
        """Returns g, the mean over the routed experts that a token uses."""
        return (self.active_ratio - self.shared) / self.active

    @property
    def expansion_rate(self) -> Fraction:
        """Returns E of Krajewski and of the joint law: expert parameters over the dense FFN's."""
        return self.sparsity

    @property
    def krajewski_granularity(self) -> Fraction:
        """Returns G = dense width / expert width."""
        return 1 / self.granularity

    @property
    def ling_granularity(self) -> Fraction:
        """Returns the granularity of Ling: 2 * model width / mean width of an expert."""
        return 2 / (self.granularity * self.dense_over_dim)

    @property
    def activation_ratio(self) -> Fraction:
        """Returns A of Ling: (active routed + shared experts) / (all routed + shared experts)."""
        return self.active_ratio / self.sparsity

    @property
    def shared_ratio(self) -> Fraction:
        """Returns S of Tencent: shared experts / (active routed + shared experts)."""
        return self.shared / self.active_ratio

    def symbols(self) -> tuple[Symbol, ...]:
        """Returns every symbol of every paper, in the order of the table above."""
        return (
            Symbol("n", "Slicing and Dicing", Fraction(self.experts)),
            Symbol("k", "Slicing and Dicing", Fraction(self.active)),
            Symbol("g", "Slicing and Dicing", self.granularity),
            Symbol("s", "Slicing and Dicing", self.sparsity),
            Symbol("E", "Krajewski, joint law", self.expansion_rate),
            Symbol("G", "Krajewski", self.krajewski_granularity),
            Symbol("E", "Ling", Fraction(self.experts)),
            Symbol("G", "Ling", self.ling_granularity),
            Symbol("A", "Ling", self.activation_ratio),
            Symbol("G", "Tencent", Fraction(self.active)),
            Symbol("S", "Tencent", self.shared_ratio),
        )


def from_config(config: Config) -> LayerShape | None:
    """Returns the shape of a config's layers relative to `reference_width`; None if dense."""
    if config.is_dense:
        return None
    dense_width = reference_width(config)
    pools = []
    first = 0
    for pool in config.pools:
        widths = config.widths[first : first + pool.num_experts]
        first += pool.num_experts
        granularity = Fraction(sum(widths), pool.num_experts) / dense_width
        pools.append(PoolShape(pool.num_experts, pool.top_k, granularity))
    shared = config.moe.shared_width / dense_width
    return LayerShape(tuple(pools), shared, dense_width / config.model.dim)


def reference_width(config: Config) -> Fraction:
    """Returns the width of the dense FFN that a config's symbols are relative to.

    It is `moe.flop_matched_width`, or without that claim, the width that a token uses.
    """
    return Fraction(config.moe.flop_matched_width) or config.active_width


def from_study(
    sparsity: Fraction | int,
    granularity: Fraction,
    shared: Fraction | int = 0,
    dense_over_dim: Fraction | int = 4,
) -> LayerShape:
    """Returns a layer with as many FLOPs per token as a dense layer, in one pool of equal experts.

    The notation is that of "Slicing and Dicing": s is the width of all experts together and g the
    width of one expert, both divided by the width of the dense layer. A shared expert takes its
    share of the dense width from the routed experts, so that k = (1 - shared) / g experts are
    chosen for a token, out of n = (s - shared) / g.

    Args:
        sparsity: s.
        granularity: g.
        shared: the width of the shared expert divided by the width of the dense layer.
        dense_over_dim: the width of the dense layer divided by the width of the model.

    Raises:
        ValueError: n or k is not an integer.
    """
    # A float such as 0.125 is exactly a fraction too.
    granularity, shared = Fraction(granularity), Fraction(shared)
    active = _whole("k = (1 - shared) / g", (1 - shared) / granularity)
    experts = _whole("n = (s - shared) / g", (Fraction(sparsity) - shared) / granularity)
    pool = PoolShape(experts, active, granularity)
    return LayerShape((pool,), shared, Fraction(dense_over_dim))


def from_krajewski(
    expansion_rate: Fraction | int, granularity: Fraction | int, dense_over_dim: Fraction | int = 4
) -> LayerShape:
    """Returns the layer with the E and G of Krajewski et al.: G of G * E experts are active.

    The joint law has no granularity: its E is that of G = 1.

    Raises:
        ValueError: G or G * E is not an integer.
    """
    granularity = Fraction(granularity)
    active = _whole("k = G", granularity)
    experts = _whole("n = G * E", granularity * Fraction(expansion_rate))
    pool = PoolShape(experts, active, 1 / granularity)
    return LayerShape((pool,), dense_over_dim=Fraction(dense_over_dim))


def from_ling(
    experts: int,
    granularity: Fraction | int,
    activation_ratio: Fraction,
    shared_experts: int = 0,
    dense_over_dim: Fraction | int = 4,
) -> LayerShape:
    """Returns the layer with the E, G, A and E_s of Ling.

    The width of the dense FFN is a unit here, not a claim: `active_ratio` need not be 1.

    Args:
        experts: routed experts, E.
        granularity: G, 2 * model width over expert width.
        activation_ratio: A, (E_a + E_s) / (E + E_s).
        shared_experts: E_s, shared experts of the width of the routed ones.
        dense_over_dim: width of the dense FFN over model width.

    Raises:
        ValueError: E_a is not an integer.
    """
    width = 2 / (Fraction(granularity) * Fraction(dense_over_dim))
    all_active = Fraction(activation_ratio) * (experts + shared_experts)
    active = _whole("E_a", all_active - shared_experts)
    pool = PoolShape(experts, active, width)
    return LayerShape((pool,), shared_experts * width, Fraction(dense_over_dim))


def _whole(name: str, value: Fraction) -> int:
    """Returns a fraction that is a positive integer as an int."""
    if value.denominator != 1 or value < 1:
        raise ValueError(f"{name} = {value} must be a whole number of at least 1")
    return int(value)
