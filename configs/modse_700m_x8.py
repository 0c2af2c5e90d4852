"""MoDSE 700Mx8 (paper, Table 1): pairs of experts whose widths sum to 10,240.

The model has 3.344 B parameters, of which 1.079 B are active if every expert receives equally many
tokens.

    python train.py --config=configs/modse_700m_x8.py --workdir=runs/modse_700m_x8 \
        --config.data.source=prepared:DIR --config.data.tokenizer=sentencepiece:FILE

Prepare the data as for configs/modse_300m_x8.py. The paper trains on 64 A800 GPUs: 6.1e20 FLOPs,
about 18 days on one H200 at 40% of its peak. Expected: better than configs/baseline_700m_x8.py on
all nine benchmarks of the paper's Table 3, by 4.4 points on average.
"""

from ml_collections import ConfigDict

from configs import modse_300m_x8
from modse_jax.moe import expert_widths


def get_config() -> ConfigDict:
    """Returns the config."""
    config = modse_300m_x8.get_config()
    config.model.dim = 2048
    config.model.num_layers = 12
    config.model.num_heads = 32
    config.moe.width = 5120
    config.moe.widths = expert_widths.widths_from_ratio_pairs(
        expert_widths.PAPER_PAIRS, config.model.dim
    )
    return config
