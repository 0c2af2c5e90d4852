"""The equal-width twin of configs/tiny.py: the same parameter count, data and schedule.

    python train.py --config=configs/tiny_baseline.py --workdir=runs/tiny_baseline

Time and expected result as configs/tiny.py; not run to the end yet. Compare the two over several seeds only: one run of
this size says nothing about widths.
"""

from configs import tiny


def get_config():
    config = tiny.get_config()
    config.moe.widths = ()
    config.moe.pairs = False
    return config
