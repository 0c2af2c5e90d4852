"""MoDSE 300Mx8 (paper, Table 1): pairs of experts whose widths sum to 7,680.

The model has 1.300 B parameters, of which 451 M are active if every expert receives equally many
tokens.

    python -m modse_jax.data.prepare --source=text:CORPUS --tokenizer=sentencepiece:FILE \
        --sequence_length=4096 --out=DIR
    python train.py --config=configs/modse_300m_x8.py --workdir=runs/modse_300m_x8 \
        --config.data.source=prepared:DIR --config.data.tokenizer=sentencepiece:FILE

To plan for hardware first, replace --workdir by --plan=v5e:4x4 --config.mesh.expert=4.

The paper trains on 100 B tokens of private English and Chinese text, on 16 A800 GPUs: 2.4e20 FLOPs,
about 7 days on one H200 at 40% of its peak. Expected: lower training and validation losses than
configs/baseline_300m_x8.py (paper, Fig. 2, which has no numbers).

The paper does not state the peak learning rate, context length, batch size and weight of the
load-balancing loss; the values here are the common choices of Llama 2 and Switch. The
load-balancing loss counts both experts of a token, as the tables of the paper do.
"""

from ml_collections import ConfigDict

from modse_jax.config.loading import default_config
from modse_jax.moe import expert_widths


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default_config()
    config.model.dim = 1536
    config.model.num_layers = 8
    config.model.num_heads = 12
    config.model.context_length = 4096
    config.model.vocab_size = 30064
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.moe.width = 3840
    config.moe.widths = expert_widths.widths_from_ratio_pairs(
        expert_widths.PAPER_PAIRS, config.model.dim
    )
    config.moe.pairs = True
    config.moe.router_noise = "learned"
    config.data.source = "prepared:data/corpus"
    config.data.tokenizer = "sentencepiece:data/tokenizer.model"
    config.data.sequence_length = 4096
    config.training.batch_size = 512
    config.training.gradient_accumulation = 16
    config.training.steps = 47684  # 100 B tokens
    config.training.eval_every = 1000
    config.training.checkpoint_every = 1000
    config.advanced.loss_chunk = 4096
    config.advanced.block_rows = 2048
    config.advanced.tail_rows = 256
    config.evaluation.batch_size = 32
    config.evaluation.prompts = ("The", "In 1905", "To make bread,")
    config.optimizer.learning_rate = 3e-4
    config.optimizer.initial_learning_rate = 2e-7
    config.optimizer.final_learning_rate = 3e-5
    config.optimizer.warmup_steps = 2000
    return config
