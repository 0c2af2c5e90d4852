"""The paper's baseline at 300Mx8: eight experts of width 3,840, otherwise configs/modse_300m_x8.py to the parameter.

    python train.py --config=configs/baseline_300m_x8.py --workdir=runs/baseline_300m_x8 \
        --config.data.source=prepared:DIR --config.data.tokenizer=sentencepiece:FILE

Time as configs/modse_300m_x8.py. Expected: a loss above it (paper, Fig. 2; no numbers are printed).
"""

from configs import modse_300m_x8


def get_config():
    config = modse_300m_x8.get_config()
    config.moe.widths = ()
    config.moe.pairs = False
    return config
