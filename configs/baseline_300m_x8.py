"""The paper's baseline at 300Mx8: eight experts of width 3,840.

Everything else is as in configs/modse_300m_x8.py, the number of parameters included.

    python train.py --config=configs/baseline_300m_x8.py --workdir=runs/baseline_300m_x8 \
        --config.data.source=prepared:DIR --config.data.tokenizer=sentencepiece:FILE

Training takes as long as configs/modse_300m_x8.py. Expected: a higher loss than that config's
(paper, Fig. 2, which has no numbers).
"""

from ml_collections import ConfigDict

from configs import modse_300m_x8


def get_config() -> ConfigDict:
    """Returns the config."""
    config = modse_300m_x8.get_config()
    config.moe.widths = ()
    config.moe.pairs = False
    return config
