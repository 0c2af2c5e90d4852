"""WikiText-2 with 8,192 sentencepiece pieces trained on it: MoDSE at a size for two CPU cores.

    python train.py --config=configs/wikitext2.py --workdir=runs/wikitext2

data/wikitext-2/ holds the published train.txt and valid.txt. Expected: 1.554 bits per byte on the validation text, 6
minutes on 2 cores.
"""

from configs import tiny
from modse_jax.moe import expert_widths


def get_config():
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
