"""AdamW as in the paper: decoupled decay on matrices only, linear warm-up, cosine to a floor."""

import jax
import optax

from modse_jax.config.options import Config


def learning_rate(config: Config) -> optax.Schedule:
    """Step -> learning rate: from initial to peak in warmup_steps, then a cosine that ends on the floor at the last
    step (MoDSE, section 4: 2e-7, 2000 steps, floor 3e-5)."""
    o, steps = config.optimizer, config.training.steps
    return optax.warmup_cosine_decay_schedule(
        o.initial_learning_rate,
        o.learning_rate,
        o.warmup_steps,
        max(steps, o.warmup_steps + 1),
        o.final_learning_rate,
    )


def build_optimizer(config: Config) -> optax.GradientTransformation:
    """Without the clip, which the step has at hand as one number (step.updated); identity keeps its place in what
    checkpoints hold."""
    o = config.optimizer
    return optax.chain(
        optax.identity(),
        optax.adamw(
            learning_rate(config),
            o.beta1,
            o.beta2,
            o.eps,
            weight_decay=o.weight_decay,
            mask=weight_decay_mask,
        ),
    )


def weight_decay_mask(params):
    """True for the leaves that decay. By name, since a norm's scale has two axes once layers are stacked."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "scale" not in path[-1].key, params)
