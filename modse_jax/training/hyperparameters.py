"""Options that can be inputs of a compiled training step instead of constants in it.

A normal run compiles its own step, in which they are constants. The runs of a sweep that differ in
these options alone share one compiled step, which has them as inputs (`programs.SharedPrograms`).
The results of both agree up to rounding: XLA folds and reorders operations with constants.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from modse_jax.config.options import (
    CheckpointConfig,
    Config,
    DataConfig,
    MoEConfig,
    OptimizerConfig,
    TrainingConfig,
)

Scalar = float | jax.Array


class Hyperparameters(NamedTuple):
    """Numbers that a training step computes with: Python floats, or float32 scalars.

    Attributes:
        learning_rate: peak of the learning rate.
        initial_learning_rate: learning rate at which the warm-up starts.
        final_ratio: learning rate at the end of the schedule over the peak.
        weight_decay: decoupled weight decay.
        balance_loss_weight: weight of the load-balancing loss.
        z_loss_weight: weight of the router z-loss.
        width_penalty_weight: weight of the width penalty.
        bias_rate: rate of loss-free balancing.
    """

    learning_rate: Scalar
    initial_learning_rate: Scalar
    final_ratio: Scalar
    weight_decay: Scalar
    balance_loss_weight: Scalar
    z_loss_weight: Scalar
    width_penalty_weight: Scalar
    bias_rate: Scalar


def from_config(config: Config) -> Hyperparameters:
    """Returns the values of a config, as Python floats."""
    return Hyperparameters(
        learning_rate=config.optimizer.learning_rate,
        initial_learning_rate=config.optimizer.initial_learning_rate,
        final_ratio=config.optimizer.final_learning_rate / config.optimizer.learning_rate,
        weight_decay=config.optimizer.weight_decay,
        balance_loss_weight=config.moe.balance_loss_weight,
        z_loss_weight=config.moe.z_loss_weight,
        width_penalty_weight=config.moe.width_penalty_weight,
        bias_rate=config.moe.bias_rate,
    )


def to_arrays(hyperparameters: Hyperparameters) -> Hyperparameters:
    """Returns the values as float32 scalars, which a compiled step can take as inputs."""
    return Hyperparameters(*(jnp.float32(value) for value in hyperparameters))


def shared_program_config(config: Config) -> Config:
    """Returns a config that is equal for all configs whose runs can share their programs.

    Hyperparameters, seeds, the names of the data, and when to log, validate and save have the same
    values in all of them. The weight of the width penalty stays 0 if it is 0, because the penalty
    is then left out of the loss.
    """
    default = OptimizerConfig()
    optimizer = dataclasses.replace(
        config.optimizer,
        learning_rate=default.learning_rate,
        initial_learning_rate=default.initial_learning_rate,
        final_learning_rate=default.final_learning_rate,
        weight_decay=default.weight_decay,
    )
    default_moe = MoEConfig()
    moe = dataclasses.replace(
        config.moe,
        balance_loss_weight=default_moe.balance_loss_weight,
        z_loss_weight=default_moe.z_loss_weight,
        width_penalty_weight=float(config.moe.width_penalty_weight > 0),
        bias_rate=default_moe.bias_rate,
    )
    default_training = TrainingConfig()
    training = dataclasses.replace(
        config.training,
        log_every=default_training.log_every,
        eval_every=default_training.eval_every,
        checkpoint_every=default_training.checkpoint_every,
        rewind=default_training.rewind,
    )
    return dataclasses.replace(
        config,
        seed=0,
        moe=moe,
        data=DataConfig(sequence_length=config.data.sequence_length),
        training=training,
        checkpoint=CheckpointConfig(),
        optimizer=optimizer,
    )
