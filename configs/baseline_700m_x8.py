"""The paper's baseline at 700Mx8: eight experts of width 5,120.

Everything else is as in configs/modse_700m_x8.py, the number of parameters included.

    python train.py --config=configs/baseline_700m_x8.py --workdir=runs/baseline_700m_x8 \
        --config.data.source=prepared:DIR --config.data.tokenizer=sentencepiece:FILE

Training takes as long as configs/modse_700m_x8.py. Expected: the column "baseline" of the paper's
Table 3, which was trained on private data.
"""

from ml_collections import ConfigDict

from configs import modse_700m_x8


def get_config() -> ConfigDict:
    """Returns the config."""
    config = modse_700m_x8.get_config()
    config.moe.widths = ()
    config.moe.pairs = False
    return config
