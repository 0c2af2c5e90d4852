"""Prints plans as a table, with advice for steps that do not fit."""

from collections.abc import Sequence

from modse_jax.planning import hlo_collectives
from modse_jax.planning.step_plan import StepPlan

NAME_WIDTH = 26  # characters of the first column, which names the fields
UNKNOWN = "?"


def format_table(plans: Sequence[StepPlan]) -> str:
    """Returns the text that --plan prints.

    It has a line per field and a column per plan, then the notes of all plans, then advice for
    those whose step does not fit into memory.
    """
    columns = [_format_column(plan, plans) for plan in plans]
    width = max(len(cell) for column in columns for cell in column.values()) + 2
    lines = []
    for name in columns[0]:
        cells = "".join(f"{column[name]:>{width}}" for column in columns)
        lines.append(f"{name:{NAME_WIDTH}}{cells}")
    lines += [f"{plan.topology}: {note}" for plan in plans for note in plan.notes]
    lines += [f"{plan.topology}: {advise(plan)}" for plan in plans if not plan.fits]
    return "\n".join(lines)


def advise(plan: StepPlan) -> str:
    """Returns a sentence on what to change in the config if the step does not fit into memory."""
    state_bytes = plan.parameter_bytes_per_device + plan.optimizer_bytes_per_device
    if plan.peak_bytes_per_device and state_bytes < plan.peak_bytes_per_device / 2:
        return (
            "most of the memory holds activations: raise training.gradient_accumulation; "
            "model.remat=full, and a smaller advanced.loss_chunk and "
            "advanced.saved_activations, also help if they are not set yet"
        )
    return (
        "most of the memory holds parameters and optimizer state: raise mesh.fsdp or mesh.expert, "
        "over which they are sharded, or use more devices"
    )


def _format_column(plan: StepPlan, plans: Sequence[StepPlan]) -> dict[str, str]:
    """Returns the column of a plan in the table, {name of the field: text}.

    Fields that no plan has, such as CUDA graph launches without a GPU, are left out. Therefore all
    plans are needed.
    """
    cells = {
        "topology": plan.topology,
        "devices": str(plan.devices),
        "mesh": " ".join(f"{axis}={size}" for axis, size in plan.mesh.items()),
        "moe.backend": plan.moe_backend,
        "attention": plan.attention,
        "parameters per device": _format_bytes(plan.parameter_bytes_per_device),
        "optimizer state": _format_bytes(plan.optimizer_bytes_per_device),
        "activations and buffers": _format_bytes(plan.activation_bytes_per_device),
        "peak": _format_bytes(plan.peak_bytes_per_device),
        "capacity": _format_bytes(plan.capacity_bytes_per_device),
        "fits": "yes" if plan.fits else "NO",
        "model FLOPs per step": f"{plan.flops_per_device:.3e}",
        "FLOPs, max/mean device": f"{plan.flops_max_over_mean:.3f}",
    }
    cells |= _format_collectives(plan, plans)
    if any(other.topology.startswith("gpu:") for other in plans):
        cells["kernels"] = _format_count(plan.kernels)
        cells["CUDA graph launches"] = _format_count(plan.graph_launches)
        cells["host waits"] = _format_count(plan.host_waits)
    seconds = plan.roofline_step_seconds
    bound = UNKNOWN if seconds is None else f"{seconds:.3f} s, {plan.roofline_bound_by}"
    cells["a step takes at least"] = bound
    cells["compiled in"] = f"{plan.compile_seconds:.0f} s"
    return cells


def _format_collectives(plan: StepPlan, plans: Sequence[StepPlan]) -> dict[str, str]:
    sent = plan.collective_bytes_by_kind
    cells = {}
    for kind in hlo_collectives.KINDS:
        if any((other.collective_bytes_by_kind or {}).get(kind) for other in plans):
            cells[f"{kind} bytes"] = UNKNOWN if sent is None else _format_bytes(sent.get(kind, 0))
    if any(other.hosts > 1 for other in plans):
        cells["bytes between hosts"] = _format_bytes(plan.collective_bytes_between_hosts)
    if any(other.unknown_collectives for other in plans):
        unknown = plan.unknown_collectives
        cells["collectives not counted"] = _format_count(None if unknown is None else len(unknown))
    return cells


def _format_bytes(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    if value >= 2**30:
        return f"{value / 2**30:,.2f} GiB"
    return f"{value / 2**20:,.1f} MiB"


def _format_count(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}"
