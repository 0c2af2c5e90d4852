"""MoDSE at a size for two CPU cores: 8 experts in four pairs of widths, top-2.

    python train.py --config=configs/tiny.py --workdir=runs/tiny

The widths are 4.5:0.5, 4:1, 3:2 and 2.5:2.5 times the model width. The model sees 2.5 M tokens of
the source of Python's standard library once. Expected: 1.83 bits per byte on validation files;
gzip -9 needs 1.84 (LOG.md). Training takes 1.5 minutes on 2 cores, at 29,000 tokens/s, and 5
minutes on older ones.
"""

from ml_collections import ConfigDict

from modse_jax.config.loading import default_config
from modse_jax.moe import expert_widths


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default_config()
    config.model.dim = 96
    config.model.num_layers = 2
    config.model.num_heads = 2
    config.model.vocab_size = 4096
    config.moe.width = 240
    config.moe.widths = expert_widths.widths_from_ratio_pairs(
        expert_widths.PAPER_PAIRS, config.model.dim
    )
    config.moe.pairs = True
    config.data.source = "python_stdlib"
    config.data.tokenizer = "sentencepiece"
    config.data.sequence_length = 256
    config.training.batch_size = 4
    config.training.steps = 2400
    config.training.checkpoint_every = 200
    config.advanced.loss_chunk = 512
    config.advanced.block_rows = 256
    config.optimizer.learning_rate = 5e-3
    config.optimizer.final_learning_rate = 2e-5
    config.optimizer.warmup_steps = 50
    return config
