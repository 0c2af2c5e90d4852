"""The options of a mixture-of-experts layer, independent of any training config."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from modse_jax.moe.experts.block_sizes import DEFAULT_BLOCKS, Blocks
from modse_jax.runtime import choices

# See gates.GATES. The names are repeated here because this module imports no array library.
GATES = (
    "top_k_softmax",
    "softmax_top_k",
    "softmax_top_k_renormalized",
    "sigmoid",
    "sigmoid_renormalized",
    "uniform",
)
ROUTER_NOISES = ("none", "learned")
BALANCE_LOSS_COUNTS = ("top_k", "argmax")
BALANCE_LOSS_SCOPES = ("batch", "device", "sequence")
BALANCE_LOSS_OVER_CHOICES = ("sum", "mean")
WIDTH_PENALTY_SCALES = ("mean", "max")
BACKENDS = ("auto", "reference", "blocked", "pallas_tpu", "pallas_gpu", "pallas_triton")
PLACEMENTS = ("whole", "split")
EXCHANGES = ("auto", "gather", "all_to_all")
CAPACITY_ORDERS = ("choice", "token")

# Capacity factors above 0. Within these limits, dispatch.expert_capacity neither rounds a factor to
# 0 nor overflows.
SMALLEST_CAPACITY_FACTOR = 1e-5
LARGEST_CAPACITY_FACTOR = 1e4

# Gates whose value is 1 if a token has a single expert, whatever its logit is.
RENORMALIZED_GATES = ("top_k_softmax", "softmax_top_k_renormalized", "sigmoid_renormalized")


class Pool(NamedTuple):
    """A group of experts with its own softmax, top-k and auxiliary losses.

    The pools of a layer lie one after another on the axis of experts.
    """

    num_experts: int
    top_k: int


class PoolRange(NamedTuple):
    """The experts and the choices of one pool among those of the layer."""

    experts: slice
    choices: slice
    top_k: int


def pool_ranges(pools: Sequence[Pool]) -> tuple[PoolRange, ...]:
    """Returns the range of every pool."""
    ranges = []
    expert = choice = 0
    for pool in pools:
        experts = slice(expert, expert + pool.num_experts)
        choices = slice(choice, choice + pool.top_k)
        ranges.append(PoolRange(experts, choices, pool.top_k))
        expert, choice = experts.stop, choices.stop
    return tuple(ranges)


@dataclasses.dataclass(frozen=True)
class RouterOptions:
    """Options of a router.

    Attributes:
        top_k: experts per token, K. Not used if there are pools.
        pools: groups of experts, each with its own router, whose outputs y_i are combined as
            sum_i k_i y_i / sum_i k_i; () for one pool of all experts.
        gate: how the gates, the weights of the chosen experts, are computed; see gates.GATES.
        gate_scale: factor of all gates.
        router_noise: "learned" adds RMSNorm(Softplus(x W_n)) to the logits (MoDSE, Eq. 3).
        balance_loss_count: the choices that the load-balancing loss counts; see
            balancing.balance_loss.
        balance_loss_scope: the tokens that the load-balancing loss and the width penalty are
            computed over: the entire batch; those of each device; or those of each sequence, that
            is of each row of the batch. The losses of devices or sequences are averaged, weighted
            by their numbers of tokens.
        balance_loss_over_choices: "mean" divides the load-balancing loss of a pool by the number
            of choices that it counts, so that it is 1 at balance.
        width_penalty_scale: the widths in the width penalty are relative to the "mean" or to the
            "max" (largest) width of the pool.
        norm_eps: epsilon of the RMSNorm in the learned term.
    """

    top_k: int = 2
    pools: tuple[Pool, ...] = ()
    gate: str = "top_k_softmax"
    gate_scale: float = 1.0
    router_noise: str = "none"
    balance_loss_count: str = "top_k"
    balance_loss_scope: str = "batch"
    balance_loss_over_choices: str = "sum"
    width_penalty_scale: str = "mean"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        choices.check(GATES, "gate", self.gate)
        choices.check(ROUTER_NOISES, "router_noise", self.router_noise)
        choices.check(BALANCE_LOSS_COUNTS, "balance_loss_count", self.balance_loss_count)
        choices.check(BALANCE_LOSS_SCOPES, "balance_loss_scope", self.balance_loss_scope)
        choices.check(
            BALANCE_LOSS_OVER_CHOICES, "balance_loss_over_choices", self.balance_loss_over_choices
        )
        choices.check(WIDTH_PENALTY_SCALES, "width_penalty_scale", self.width_penalty_scale)

    def pools_of(self, num_experts: int) -> tuple[Pool, ...]:
        """Returns the pools of a layer; one with all experts if none are given.

        Raises:
            ValueError: the pools do not have as many experts as the layer, or a pool has fewer
                experts than a token is routed to.
        """
        pools = self.pools or (Pool(num_experts, self.top_k),)
        total = sum(pool.num_experts for pool in pools)
        if total != num_experts:
            raise ValueError(f"the pools {pools} have {total} experts, the layer has {num_experts}")
        for pool in pools:
            if not 1 <= pool.top_k <= pool.num_experts:
                raise ValueError(
                    f"top_k={pool.top_k} must be between 1 and the number of experts, "
                    f"{pool.num_experts}"
                )
        return pools


@dataclasses.dataclass(frozen=True)
class ExpertOptions:
    """Options for computing the experts.

    Attributes:
        backend: the implementation of the grouped expert FFN; see experts.select.select_backend.
        placement: how experts are sharded over the `expert` axis of a mesh: "whole" gives whole
            experts to every device, "split" a slice of every expert's hidden units.
        exchange: how tokens reach the experts of other devices: "gather" (all-gather and
            reduce-scatter) or "all_to_all"; "auto" chooses the one that sends fewer bytes.
        capacity_factor: the largest number of tokens of an expert, relative to an even share of
            its pool's routed tokens; 0 means that no token is dropped.
        capacity_order: which routed tokens are kept: "choice" serves the first choices of all
            tokens, then the second choices, and so on (GShard); "token" serves all choices of the
            first token, then those of the second.
        copy_experts: experts of width 0 whose output is the input of the layer (MoE++). The output
            of other experts of width 0 is 0.
        blocks: block sizes of the `blocked` backend.
    """

    backend: str = "auto"
    placement: str = "whole"
    exchange: str = "auto"
    capacity_factor: float = 0.0
    capacity_order: str = "choice"
    copy_experts: tuple[int, ...] = ()
    blocks: Blocks = DEFAULT_BLOCKS

    def __post_init__(self) -> None:
        choices.check(BACKENDS, "backend", self.backend)
        choices.check(PLACEMENTS, "placement", self.placement)
        choices.check(EXCHANGES, "exchange", self.exchange)
        choices.check(CAPACITY_ORDERS, "capacity_order", self.capacity_order)
        try:
            check_capacity_factor(self.capacity_factor)
        except ValueError as error:
            raise ValueError(f"capacity_factor={error}") from None
        if self.exchange == "all_to_all" and (self.placement != "whole" or self.capacity_factor):
            raise ValueError(
                "exchange='all_to_all' needs whole experts and no capacity: set placement='whole' "
                "and capacity_factor=0, or choose exchange='gather'"
            )


def check_capacity_factor(factor: float) -> None:
    """Checks a capacity factor.

    Raises:
        ValueError: it is neither 0 nor within the limits, or it is NaN. The message begins with it.
    """
    if factor and not SMALLEST_CAPACITY_FACTOR <= factor <= LARGEST_CAPACITY_FACTOR:
        raise ValueError(
            f"{factor} must be 0, so that no token is dropped, or from "
            f"{SMALLEST_CAPACITY_FACTOR:.5f} to {LARGEST_CAPACITY_FACTOR:g}"
        )
