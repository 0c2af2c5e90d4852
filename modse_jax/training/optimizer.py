"""The optimizer of the paper: AdamW with linear warmup and cosine decay to a floor.

Weight decay is decoupled and, by default, applies to weight matrices only.
"""

import functools
from typing import Any

import jax
import optax

from modse_jax.config.options import WEIGHT_DECAY_ON, Config
from modse_jax.runtime import choices
from modse_jax.training import hyperparameters
from modse_jax.training.hyperparameters import Hyperparameters


def learning_rate(config: Config, values: Hyperparameters | None = None) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates before.

    It rises linearly to the peak in `warmup_steps`, then follows a cosine that reaches its floor at
    step `training.steps` of the schedule (MoDSE, section 4: from 2e-7, 2000 warmup steps, floor
    3e-5). The first update uses step `first_step` of the schedule. If that is 0, as in all older
    runs, the last update uses step `training.steps - 1` and so a rate slightly above the floor:
    with a peak of 3e-4 and a floor of 3e-5, by 5.5% of it with 30 steps and by 0.02% with 1,000.

    Args:
      config: the config.
      values: hyperparameters; None for those of the config.
    """
    options = config.optimizer
    decay_steps = max(config.training.steps, options.warmup_steps + 1)
    values = values or hyperparameters.from_config(config)
    # The same as optax.warmup_cosine_decay_schedule, which does not accept traced values.
    warmup = optax.linear_schedule(
        values.initial_learning_rate, values.learning_rate, options.warmup_steps
    )
    decay = optax.cosine_decay_schedule(
        values.learning_rate, decay_steps - options.warmup_steps, values.final_ratio
    )
    schedule = optax.join_schedules([warmup, decay], [options.warmup_steps])
    if not options.first_step:
        return schedule
    return lambda updates: schedule(updates + options.first_step)


def build_optimizer(
    config: Config, values: Hyperparameters | None = None
) -> optax.GradientTransformation:
    """Returns AdamW without gradient clipping.

    Args:
      config: the config.
      values: hyperparameters; None for those of the config.

    `train_step` clips gradients itself, because it has computed their global norm already. The
    identity stands where a clipping transformation was in earlier versions, so that the optimizer
    state has the same tree structure and old checkpoints can be restored.
    """
    options = config.optimizer
    values = values or hyperparameters.from_config(config)
    adamw = optax.adamw(
        learning_rate(config, values),
        b1=options.beta1,
        b2=options.beta2,
        eps=options.eps,
        weight_decay=values.weight_decay,
        mask=functools.partial(weight_decay_mask, decays_on=options.weight_decay_on),
    )
    return optax.chain(optax.identity(), adamw)


def weight_decay_mask(params: Any, decays_on: str) -> Any:
    """Returns a tree of bools that is True for the parameters that decay.

    Args:
      params: parameters of the model.
      decays_on: `optimizer.weight_decay_on`. "all" selects every parameter. "matrices" selects all
        but the scales of norms, which are recognized by name. They cannot be recognized as vectors,
        because the parameters of all layers are stacked.
    """

    choices.check(WEIGHT_DECAY_ON, "optimizer.weight_decay_on", decays_on)

    def decays(path: tuple, _: Any) -> bool:
        return decays_on == "all" or "scale" not in path[-1].key

    return jax.tree_util.tree_map_with_path(decays, params)
