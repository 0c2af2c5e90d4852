"""WikiText-2 at a size for two CPU cores: MoDSE with 8,192 sentencepiece pieces.

The tokenizer is trained on the training text.

    python train.py --config=configs/wikitext2.py --workdir=runs/wikitext2

data/wikitext-2/ must hold train.txt and valid.txt, the published training and validation texts of
WikiText-2 (Merity et al., 2016) with <unk> for rare words; the Hugging Face dataset
Salesforce/wikitext has them as wikitext-2-v1. Expected: 1.554 bits per byte on the validation
text. Training takes 6 minutes on 2 cores.
"""

from ml_collections import ConfigDict

from configs import tiny
from modse_jax.moe import expert_widths


def get_config() -> ConfigDict:
    """Returns the config."""
    config = tiny.get_config()
    config.model.update(dim=128, num_layers=3, num_heads=2, context_length=512, vocab_size=8192)
    config.moe.width = 320
    config.moe.widths = expert_widths.widths_from_ratio_pairs(
        expert_widths.PAPER_PAIRS, config.model.dim
    )
    config.data.update(
        source="text:data/wikitext-2/train.txt",
        validation_source="text:data/wikitext-2/valid.txt",
        sequence_length=256,
    )
    config.training.update(batch_size=8, steps=2000, eval_every=500, checkpoint_every=500)
    config.optimizer.update(learning_rate=4e-3, final_learning_rate=4e-5, warmup_steps=100)
    config.evaluation.prompts = (" = History = \n", " The ", " In 1998 , ")
    return config
