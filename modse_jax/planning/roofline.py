"""The time that no training step can be faster than, from the rates of the hardware."""

from typing import NamedTuple

from modse_jax.config.options import Config
from modse_jax.planning.step_plan import StepPlan
from modse_jax.runtime import chips


class Roofline(NamedTuple):
    """The longest of the times that a step needs on each resource."""

    seconds: float
    bound_by: str  # "products" (matmuls), "collectives", "memory" or "network"


def estimate_roofline(config: Config, chip: str, plan: StepPlan) -> Roofline | None:
    """Returns the lower bound of a step's time; None for a chip whose rates are unknown.

    It is the longest of:
        products: the matmuls of the most loaded device at the peak rate.
        collectives: the bytes sent within hosts at the rate of all links together.
        memory: parameters and optimizer state read and written once, and the weights read three
            times per micro-batch.
        network: the bytes sent to other hosts at the rate of the network.

    Args:
        config: of the run.
        chip: a name in chips.CHIPS, or "cpu".
        plan: FLOPs, bytes of the state, and bytes of collectives are read from it.
    """
    rates = chips.CHIPS.get(chip)
    if rates is None:
        return None
    between_hosts = plan.collective_bytes_between_hosts or 0.0
    within_hosts = sum((plan.collective_bytes_by_kind or {}).values()) - between_hosts
    busiest_flops = plan.flops_per_device * plan.flops_max_over_mean
    seconds = {
        "products": busiest_flops / (rates.teraflops * 1e12),
        "collectives": within_hosts / (rates.link_terabytes * 1e12),
        "memory": _count_memory_traffic(config, plan) / (rates.terabytes * 1e12),
    }
    if between_hosts:
        assert rates.network_terabytes is not None, f"{chip} has no network between hosts"
        seconds["network"] = between_hosts / (rates.network_terabytes * 1e12)
    bound_by = max(seconds, key=lambda resource: seconds[resource])
    return Roofline(seconds[bound_by], bound_by)


def _count_memory_traffic(config: Config, plan: StepPlan) -> float:
    """Returns the bytes of memory that a step must read and write on a device."""
    is_half_precision = config.model.dtype == "bfloat16"
    weight_bytes = plan.parameter_bytes_per_device * (0.5 if is_half_precision else 1)
    state_bytes = plan.parameter_bytes_per_device + plan.optimizer_bytes_per_device
    return 2 * state_bytes + 3 * config.training.gradient_accumulation * weight_bytes
