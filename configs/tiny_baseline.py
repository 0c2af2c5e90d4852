"""The counterpart of configs/tiny.py with equal widths: same parameter count, data and schedule.

    python train.py --config=configs/tiny_baseline.py --workdir=runs/tiny_baseline

Training takes as long as configs/tiny.py. No expected result is recorded. Compare the two over
several seeds: a single run of this size says nothing about widths.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    """Returns the config."""
    config = tiny.get_config()
    config.moe.widths = ()
    config.moe.pairs = False
    return config
