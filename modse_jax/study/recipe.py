"""The training recipe of Slicing and Dicing as a set of options (its section 5, README and code).

Every run of the study shares these options; `arms` adds the size and the layer. Another config file
applies them with

    config.update_from_flattened_dict(recipe.recipe_options())

The study counts its load-balancing loss on each device's micro-batch of 16 sequences. So choose
`training.gradient_accumulation` such that a device has 16 sequences at a time; the 32 here is right
for one device.
"""

from typing import Any

PEAK_LEARNING_RATE = 4e-4
FINAL_RATIO = 0.1  # of the peak, at the end of the cosine

VOCABULARY = 100_352  # the dolma2 tokenizer, padded
SEQUENCE_LENGTH = 2048
BATCH_SIZE = 512  # sequences, so that a step has 1,048,576 tokens


def recipe_options(learning_rate: float = PEAK_LEARNING_RATE) -> dict[str, Any]:
    """Returns {"section.option": value} of the recipe.

    Args:
        learning_rate: the peak. The study uses one for all sizes, which is far below what scaling
            laws advise for the small ones; compare arms at several rates.
    """
    return {
        **_model_options(),
        **_router_options(),
        **_training_options(),
        "optimizer.learning_rate": learning_rate,
        "optimizer.final_learning_rate": FINAL_RATIO * learning_rate,
    }


def _model_options() -> dict[str, Any]:
    return {
        "model.vocab_size": VOCABULARY,
        "model.context_length": SEQUENCE_LENGTH,
        "model.num_kv_heads": 0,
        "model.tie_embeddings": False,
        "model.norm_position": "post",
        "model.qk_norm": "full",
        "model.norm_eps": 1e-6,
        "model.init_std": 0.02,
        "model.rope_base": 500_000.0,
        "model.dtype": "bfloat16",
    }


def _router_options() -> dict[str, Any]:
    return {
        "moe.gate": "softmax_top_k",
        "moe.router_noise": "none",
        "moe.gate_scale": 1.0,
        "moe.balance_loss_weight": 1e-2,
        "moe.balance_loss_count": "top_k",
        "moe.balance_loss_scope": "device",
        "moe.balance_loss_over_choices": "mean",  # so that the loss is 1 at perfect balance
        "moe.auxiliary_over_layers": "mean",
        "moe.z_loss_weight": 1e-3,
        "moe.bias_rule": "none",
        "moe.capacity_factor": 0.0,
    }


def _training_options() -> dict[str, Any]:
    return {
        "seed": 12536,
        "data.source": "prepared:data/olmoe_mix",
        "data.tokenizer": "hf:data/dolma2_tokenizer.json",
        "data.sequence_length": SEQUENCE_LENGTH,
        "data.packing": "concat",
        "data.shuffle_seed": 34521,
        "training.batch_size": BATCH_SIZE,
        "training.gradient_accumulation": 32,
        "training.vocab_z_loss_weight": 1e-5,
        "training.eval_every": 100,
        "training.log_every": 10,
        "optimizer.initial_learning_rate": 0.0,
        "optimizer.warmup_steps": 50,
        "optimizer.first_step": 1,
        "optimizer.beta1": 0.9,
        "optimizer.beta2": 0.95,
        "optimizer.eps": 1e-8,
        "optimizer.weight_decay": 0.1,
        "optimizer.weight_decay_on": "all",
        "optimizer.grad_clip": 1.0,
    }
