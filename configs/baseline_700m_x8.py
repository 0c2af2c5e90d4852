"""The paper's baseline at 700Mx8: eight experts of width 5,120, otherwise configs/modse_700m_x8.py to the parameter.

    python train.py --config=configs/baseline_700m_x8.py --workdir=runs/baseline_700m_x8 \
        --config.data.source=prepared:DIR --config.data.tokenizer=sentencepiece:FILE

Time as configs/modse_700m_x8.py. Expected: the "baseline" column of the paper's Table 3, on its private data.
"""

from configs import modse_700m_x8


def get_config():
    config = modse_700m_x8.get_config()
    config.moe.widths = ()
    config.moe.pairs = False
    return config
