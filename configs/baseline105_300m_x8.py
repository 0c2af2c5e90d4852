"""The paper's control "Baseline 105%" at 300Mx8: equal experts that are 5% wider.

It controls for the possibility that MoDSE's tokens choose experts wider than the mean.

    python train.py --config=configs/baseline105_300m_x8.py --workdir=runs/baseline105_300m_x8 \
        --config.data.source=prepared:DIR --config.data.tokenizer=sentencepiece:FILE

The width is 4,032 = 1.05 x 3,840, a multiple of 64; the paper prints 4,045, which is not divisible
by any tile size. The model has 1.357 B parameters, 465 M of them active. Training takes 3% longer
than configs/modse_300m_x8.py. Expected: a loss close to the baseline's (paper, section 4.2).
"""

from ml_collections import ConfigDict

from configs import baseline_300m_x8


def get_config() -> ConfigDict:
    """Returns the config."""
    config = baseline_300m_x8.get_config()
    config.moe.width = 4032
    return config
