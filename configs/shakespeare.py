"""Shakespeare's plays, a byte at a time: MoDSE with the active size of nanoGPT's small CPU setting.

    head -c 1003854 input.txt > data/shakespeare/train.txt    # the first 90%, as nanoGPT cuts it
    tail -c +1003855 input.txt > data/shakespeare/valid.txt
    python train.py --config=configs/shakespeare.py --workdir=runs/shakespeare

4 layers, 4 heads, model width 128, context 64, 2,000 steps of 12 x 64 tokens, as there; two experts of 8, 340 columns a
token on average, hold what its feed-forward layers do. Expected: 1.639 nats per character on the last 10%, where
nanoGPT's README has 1.88; 2 minutes on 2 cores.
"""

from configs import tiny


def get_config():
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
