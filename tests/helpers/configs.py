"""The small config that most tests start from."""

import dataclasses

from modse_jax.config.options import (
    AdvancedConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainingConfig,
)


def tiny_config(**sections) -> Config:
    """Returns the config of a model with two layers and four experts of three widths.

    Sections override fields: tiny_config(moe=dict(top_k=1)). The `reference` backend is used
    because it compiles fastest; tests of `blocked` select it.
    """
    base = dict(
        model=ModelConfig(dim=16, num_layers=2, num_heads=2, context_length=64, vocab_size=300),
        moe=MoEConfig(
            num_experts=4,
            top_k=2,
            width=12,
            widths=(20, 4, 12, 12),
            pairs=True,
            backend="reference",
        ),
        data=DataConfig(tokenizer="bytes", sequence_length=32),
        training=TrainingConfig(batch_size=8, steps=6, log_every=2, checkpoint_every=3),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        evaluation=EvaluationConfig(batch_size=8, sample_tokens=4),
        advanced=AdvancedConfig(unroll=1, block_rows=8, tail_rows=8, loss_chunk=64),
    )
    seed = sections.pop("seed", 0)
    return Config(
        seed=seed,
        **{
            name: dataclasses.replace(section, **sections.pop(name, {}))
            for name, section in base.items()
        },
        **sections,
    )
