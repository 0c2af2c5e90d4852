"""Peak rates and memory sizes of known accelerators, as their manufacturers publish them.

TPU v4 and v5p have two cores per chip that JAX presents as one device. None of the kernels here
supports v7x yet; it is in the table for its rates.
"""

from typing import NamedTuple

import jax


class Chip(NamedTuple):
    """Data-sheet values of one chip.

    Attributes:
      kinds: substrings of jax's `device_kind` that identify the chip.
      teraflops: dense bfloat16 rate, TFLOP/s.
      terabytes: memory bandwidth, TB/s.
      gigabytes: memory available to a program, GiB.
      link_terabytes: bandwidth of all links to other chips together, in one direction, TB/s.
      network_terabytes: bandwidth of a GPU to other hosts, TB/s. This is an assumption about the
        cluster: one network adapter per GPU, of 400 Gb/s, and of 200 Gb/s for an A100, as in
        NVIDIA's DGX. None for TPUs: the links of a slice connect its hosts, too.
    """

    kinds: tuple[str, ...]
    teraflops: float
    terabytes: float
    gigabytes: float
    link_terabytes: float
    network_terabytes: float | None = None


# Those of TPUs are from https://cloud.google.com/tpu/docs/v5p and its neighbors v4, v5e, v6e and
# tpu7x; a bandwidth that is printed for both directions is halved.
# `chip_name` returns the first entry that matches. "H200" is a substring of "GH200", which is an
# H100, so h100 must come before h200.
CHIPS = {
    "v4": Chip(("TPU v4",), 275, 1.228, 30.75, 0.3),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197, 0.819, 15.75, 0.2),
    "v5p": Chip(("TPU v5",), 459, 2.765, 95.74, 0.6),
    "v6e": Chip(("TPU v6",), 918, 1.638, 31.25, 0.4),
    "v7x": Chip(("TPU7x",), 2307, 7.4, 192, 0.6),
    "h100": Chip(("H100", "GH200"), 989, 3.35, 79, 0.45, 0.05),
    "h200": Chip(("H200",), 989, 4.8, 139, 0.45, 0.05),
    "a100": Chip(("A100",), 312, 2.0, 79, 0.3, 0.025),
    "b200": Chip(("B200",), 2250, 8.0, 178, 0.9, 0.05),
}

TPUS = tuple(name for name, chip in CHIPS.items() if chip.kinds[0].startswith("TPU"))
GPUS = tuple(name for name in CHIPS if name not in TPUS)


def is_gpu(chip: str) -> bool:
    """Returns True if a name that `chip_name` returned is that of a GPU.

    That includes "gpu", which stands for a GPU that is not in `CHIPS`.
    """
    return chip == "gpu" or chip in GPUS


def chip_name(device: jax.Device) -> str:
    """Returns the name of a device in `CHIPS`.

    For other devices: "cpu" or "gpu" on those platforms, else jax's `device_kind`.
    """
    for name, chip in CHIPS.items():
        if any(kind in device.device_kind for kind in chip.kinds):
            return name
    if device.platform in ("cpu", "gpu"):
        return device.platform
    return device.device_kind
