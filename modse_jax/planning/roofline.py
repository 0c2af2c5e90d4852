"""The time that no training step can be faster than, from the rates of the hardware."""

from typing import NamedTuple

from modse_jax.config.options import Config
from modse_jax.planning.step_plan import StepPlan
from modse_jax.runtime import chips


class Roofline(NamedTuple):
    """A lower bound of the time of a training step, and the resource that sets it."""

    seconds: float
    bound_by: str  # "products" (matmuls), "collectives", "memory" or "network"


def estimate_roofline(config: Config, chip: str, plan: StepPlan) -> Roofline | None:
    """Returns a lower bound of the time of a training step; None if the chip's rates are unknown.

    It is the longest of these times, each of which assumes that nothing else limits the step:
        products: the matmuls of the most loaded device, at the chip's peak FLOP rate.
        collectives: the bytes sent within hosts, at the rate of all links of a chip together.
        memory: the parameters and the optimizer state are read and written once, and the weights
            are read three times per micro-batch, at the memory bandwidth.
        network: the bytes sent to other hosts, at the rate of the network.

    Args:
        config: the config of the run.
        chip: a name in chips.CHIPS, or "cpu".
        plan: the plan of the step, with FLOPs, bytes of the state, and bytes of collectives.
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
    """Returns the bytes that a device must at least read from and write to its memory in a step."""
    is_half_precision = config.model.dtype == "bfloat16"
    weight_bytes = plan.parameter_bytes_per_device * (0.5 if is_half_precision else 1)
    state_bytes = plan.parameter_bytes_per_device + plan.optimizer_bytes_per_device
    return 2 * state_bytes + 3 * config.training.gradient_accumulation * weight_bytes
