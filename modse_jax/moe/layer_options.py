"""The options of a mixture-of-experts layer, independent of any training config."""

import dataclasses
from typing import NamedTuple

from modse_jax.moe.experts.block_sizes import DEFAULT_BLOCKS, Blocks

GATES = ("top_k_softmax", "softmax_top_k", "softmax_top_k_renormalized")
ROUTER_NOISES = ("none", "learned")
BALANCE_LOSS_COUNTS = ("top_k", "argmax")
BALANCE_LOSS_SCOPES = ("batch", "device")
BACKENDS = ("auto", "reference", "blocked", "pallas_tpu", "pallas_gpu", "pallas_triton")
PLACEMENTS = ("whole", "split")
EXCHANGES = ("auto", "gather", "all_to_all")


class Pool(NamedTuple):
    """A group of experts with its own softmax, top-k and auxiliary losses.

    The pools of a layer lie one after another on the axis of experts.
    """

    num_experts: int
    top_k: int


@dataclasses.dataclass(frozen=True)
class RouterOptions:
    """Options of a router.

    Attributes:
        top_k: experts per token, K.
        gate: how the gates, the weights of the chosen experts, are computed; see
            router.compute_gates.
        router_noise: "learned" adds RMSNorm(Softplus(x W_n)) to the logits (MoDSE, Eq. 3).
        balance_loss_count: the choices that the load-balancing loss counts; see
            router.balance_loss.
        balance_loss_scope: the tokens that the load-balancing loss is computed over: the whole
            batch, or those of each device, averaged over the devices by their number of tokens.
        norm_eps: epsilon of the RMSNorm in the learned term.
    """

    top_k: int = 2
    gate: str = "top_k_softmax"
    router_noise: str = "none"
    balance_loss_count: str = "top_k"
    balance_loss_scope: str = "batch"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_choice("gate", self.gate, GATES)
        _check_choice("router_noise", self.router_noise, ROUTER_NOISES)
        _check_choice("balance_loss_count", self.balance_loss_count, BALANCE_LOSS_COUNTS)
        _check_choice("balance_loss_scope", self.balance_loss_scope, BALANCE_LOSS_SCOPES)


@dataclasses.dataclass(frozen=True)
class ExpertOptions:
    """Options for computing the experts.

    Attributes:
        backend: the implementation of the grouped expert FFN; see experts.select.select_backend.
        placement: how experts are sharded over the `expert` axis of a mesh: "whole" gives whole
            experts to every device, "split" a slice of every expert's hidden units.
        exchange: how tokens reach the experts of other devices: "gather" (all-gather and
            reduce-scatter) or "all_to_all"; "auto" chooses the one that sends fewer bytes.
        capacity_factor: the largest number of tokens of an expert, relative to an even share;
            0 means that no token is dropped.
        blocks: block sizes of the `blocked` backend.
    """

    backend: str = "auto"
    placement: str = "whole"
    exchange: str = "auto"
    capacity_factor: float = 0.0
    blocks: Blocks = DEFAULT_BLOCKS

    def __post_init__(self) -> None:
        _check_choice("backend", self.backend, BACKENDS)
        _check_choice("placement", self.placement, PLACEMENTS)
        _check_choice("exchange", self.exchange, EXCHANGES)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")
