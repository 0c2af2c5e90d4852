"""Shakespeare's plays as bytes: MoDSE with the active size of nanoGPT's small CPU setting.

    head -c 1003854 input.txt > data/shakespeare/train.txt    # the first 90%, as nanoGPT splits it
    tail -c +1003855 input.txt > data/shakespeare/valid.txt
    python train.py --config=configs/shakespeare.py --workdir=runs/shakespeare

As in nanoGPT, the model has 4 layers, 4 heads and model width 128, and trains for 2,000 steps on
12 x 64 tokens. context_length is 128, so that samples can be longer than the training sequences.
A token's two of 8 experts have 340 hidden units together on average, which is about as many
parameters as nanoGPT's feed-forward layers have.

Expected: 1.639 nats per character on the last 10%, where nanoGPT's README reports 1.88. Training
takes 2 minutes on 2 cores.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    """Returns the config."""
    config = tiny.get_config()
    config.model.update(dim=128, num_layers=4, num_heads=4, context_length=128, vocab_size=259)
    config.moe.update(width=170, widths=(306, 34, 272, 68, 204, 136, 170, 170))
    config.data.update(
        source="text:data/shakespeare/train.txt",
        validation_source="text:data/shakespeare/valid.txt",
        tokenizer="bytes",
        sequence_length=64,
    )
    config.training.update(batch_size=12, steps=2000, eval_every=500, checkpoint_every=500)
    config.optimizer.update(learning_rate=3e-3, final_learning_rate=1e-4, warmup_steps=100)
    config.evaluation.prompts = ("ROMEO:\n", "First Citizen:\n", "KING ")
    return config
