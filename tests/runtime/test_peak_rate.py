"""The peak rate of devices, from the table of chips or measured."""

import types

import jax
import pytest

from modse_jax.runtime import chips, peak_rate


def test_measured_cpu_peak_is_plausible_and_counts_the_cores_once():
    """A smoke test of the measurement. Virtual devices of one process share its cores."""
    peak = peak_rate.peak_flops(jax.devices()[:1])
    assert 1e8 < peak < 1e14
    assert peak_rate.peak_flops(jax.devices()) == peak


@pytest.mark.parametrize(
    "kind, platform, name, teraflops",
    [
        ("TPU v5 lite", "tpu", "v5e", 197),
        ("TPU v5p", "tpu", "v5p", 459),
        ("TPU v5", "tpu", "v5p", 459),
        ("NVIDIA H200", "gpu", "h200", 989),
        ("NVIDIA GH200 480GB", "gpu", "h100", 989),
        ("NVIDIA A100-SXM4-80GB", "gpu", "a100", 312),
        ("TPU v9", "tpu", "TPU v9", None),
        ("Some GPU", "gpu", "gpu", None),
    ],
)
def test_chips_are_recognized_by_their_device_kind(kind, platform, name, teraflops):
    device = types.SimpleNamespace(device_kind=kind, platform=platform)
    expected = None if teraflops is None else 2 * teraflops * 1e12
    assert chips.chip_name(device) == name
    assert peak_rate.peak_flops([device] * 2) == expected


def test_rates_of_tpus_are_those_that_google_prints():
    """TFLOP/s in bfloat16, TB/s of the memory, and TB/s of all links in one direction."""
    printed = {
        "v4": (275, 1.228, 0.3),
        "v5e": (197, 0.819, 0.2),
        "v5p": (459, 2.765, 0.6),
        "v6e": (918, 1.638, 0.4),
        "v7x": (2307, 7.4, 0.6),
    }
    rates = {
        name: (chip.teraflops, chip.terabytes, chip.link_terabytes)
        for name, chip in chips.CHIPS.items()
        if name in chips.TPUS
    }
    assert rates == printed
