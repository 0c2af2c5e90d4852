"""The paper's control "Baseline 105%": equal experts, 5% wider, for MoDSE choosing wider experts than the mean.

    python train.py --config=configs/baseline105_300m_x8.py --workdir=runs/baseline105_300m_x8 \
        --config.data.source=prepared:DIR --config.data.tokenizer=sentencepiece:FILE

Width 4,032 = 1.05 x 3,840, a multiple of 64; the paper prints 4,045, which no tile divides. 1.357 B parameters, 465 M
active. Time: 3% above configs/modse_300m_x8.py. Expected: a loss close to the baseline's (paper, section 4.2).
"""

from configs import baseline_300m_x8


def get_config():
    config = baseline_300m_x8.get_config()
    config.moe.width = 4032
    return config
