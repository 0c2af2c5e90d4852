"""What the makers print about their chips: the one table of peak rates.

TPU v4 and v5p count two cores that work as one; v7x has none of our kernels yet and is here for its rates.
"""

from typing import NamedTuple

import jax


class Chip(NamedTuple):
    kinds: tuple[str, ...]  # parts of jax's device_kind
    teraflops: float  # dense bf16 TFLOP/s
    terabytes: float  # memory bandwidth, TB/s
    gigabytes: float  # memory that a program can have, GiB
    link_terabytes: float  # sent by all links of a chip together, TB/s, one direction
    # Sent by a GPU to other hosts, TB/s. This is an assumption about the cluster: one network adapter per GPU, of
    # 400 Gb/s, and of 200 Gb/s beside an A100, as in NVIDIA's DGX. The links of a TPU slice join its hosts, too.
    network_terabytes: float | None = None


CHIPS = {
    "v4": Chip(("TPU v4",), 275, 1.23, 30.75, 0.3),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197, 0.82, 15.75, 0.2),
    "v5p": Chip(("TPU v5",), 459, 2.46, 95.74, 0.6),
    "v6e": Chip(("TPU v6",), 920, 1.64, 31.25, 0.448),
    "v7x": Chip(("TPU7x",), 2310, 7.4, 192, 0.6),
    "h100": Chip(
        ("H100", "GH200"), 989, 3.35, 79, 0.45, 0.05
    ),  # before h200, whose name is part of GH200's
    "h200": Chip(("H200",), 989, 4.8, 139, 0.45, 0.05),
    "a100": Chip(("A100",), 312, 2.0, 79, 0.3, 0.025),
    "b200": Chip(("B200",), 2250, 8.0, 178, 0.9, 0.05),
}


TPUS = tuple(chip_name for chip_name, chip in CHIPS.items() if chip.kinds[0].startswith("TPU"))


GPUS = tuple(chip_name for chip_name in CHIPS if chip_name not in TPUS)


def is_gpu(chip: str) -> bool:
    """Returns whether a name, as `name` returns it, is that of a GPU, be it one in CHIPS or another."""
    return chip == "gpu" or chip in GPUS


def chip_name(device: jax.Device) -> str:
    """The device's name in CHIPS; "cpu" and "gpu" for others of those platforms, else jax's device_kind."""
    for chip, facts in CHIPS.items():
        if any(kind in device.device_kind for kind in facts.kinds):
            return chip
    return device.platform if device.platform in ("cpu", "gpu") else device.device_kind
