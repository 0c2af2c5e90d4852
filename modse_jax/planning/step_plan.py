"""The result of planning a training step for one topology."""

import dataclasses


@dataclasses.dataclass(kw_only=True)
class StepPlan:
    """Memory, FLOPs, communication and kernel launches of a training step on one topology.

    Fields that are None are unknown, because the step does not fit into memory or the compiler does
    not report them.

    Attributes:
        topology: name of the topology, as in --plan.
        devices: number of devices of the mesh.
        hosts: number of hosts; 1 for a TPU slice, whose links also connect its hosts.
        mesh: size of every mesh axis.
        moe_backend: backend of the expert FFN, with "auto" resolved.
        attention: implementation of attention, with "auto" resolved.
        parameter_bytes_per_device: size of the float32 parameters.
        optimizer_bytes_per_device: size of the state of the optimizer.
        activation_bytes_per_device: temporary memory of the step, mostly activations.
        peak_bytes_per_device: arguments, temporary memory and outputs together.
        capacity_bytes_per_device: memory of a device that a program can use.
        fits: whether the peak is within the capacity.
        flops_per_device: FLOPs of the model in forward and backward pass, without
            rematerialization, if every expert receives equally many tokens.
        flops_max_over_mean: load imbalance, FLOPs of the most loaded device over the mean.
        collective_bytes_by_kind: bytes that a device sends in a step, by kind of collective.
        collective_bytes_between_hosts: those of these bytes that must go to other hosts.
        unknown_collectives: one sentence for each collective whose bytes are not known and not
            included.
        kernels: number of kernels that run on a GPU in a step.
        graph_launches: number of CUDA graphs that the host launches in a step.
        host_waits: how often the host waits for a number from the GPU in a step.
        open_loops: number of loops outside CUDA graphs whose trip count depends on data.
        roofline_step_seconds: lower bound of the time of a step; see roofline.py.
        roofline_bound_by: the resource that needs this time.
        compile_seconds: duration of the compilation.
        notes: sentences to print below the table.
    """

    topology: str
    devices: int
    hosts: int
    mesh: dict[str, int]
    moe_backend: str
    attention: str
    parameter_bytes_per_device: int
    optimizer_bytes_per_device: int
    activation_bytes_per_device: int | None = None
    peak_bytes_per_device: float | None = None
    capacity_bytes_per_device: float
    fits: bool | None = None
    flops_per_device: float
    flops_max_over_mean: float
    collective_bytes_by_kind: dict[str, float] | None = None
    collective_bytes_between_hosts: float | None = None
    unknown_collectives: list[str] | None = None
    kernels: float | None = None
    graph_launches: float | None = None
    host_waits: float | None = None
    open_loops: int | None = None
    roofline_step_seconds: float | None = None
    roofline_bound_by: str | None = None
    compile_seconds: float | None = None
    notes: list[str] = dataclasses.field(default_factory=list)


def to_dict(plan: StepPlan) -> dict:
    """Returns the fields of a plan, in their order, as --plan_json writes them."""
    return dataclasses.asdict(plan)
