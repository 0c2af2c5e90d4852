"""Detection of faulty hardware: a step is executed twice and the results are compared."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from modse_jax.training.train_step import Batch, Metrics, State, TrainStep


class Replay(NamedTuple):
    """The result of a step, and whether executing it again gave the same bits."""

    state: State
    metrics: Metrics
    is_same: bool


def run_twice(train_step: TrainStep, state: State, batch: Batch) -> Replay:
    """Executes a training step twice from the same state, and compares the results bit for bit.

    This needs memory for a second state.
    """
    copied_state = jax.tree.map(jnp.copy, state)
    new_state, metrics = train_step(state, batch)
    replayed_state, _ = train_step(copied_state, batch)
    return Replay(new_state, metrics, bool(_have_same_bits(new_state, replayed_state)))


@jax.jit
def _have_same_bits(one: State, other: State) -> jax.Array:
    def compare(a: jax.Array, b: jax.Array) -> Any:
        # Compared as integers, because NaN differs from itself.
        a_bits = jax.lax.bitcast_convert_type(a, jnp.uint32)
        b_bits = jax.lax.bitcast_convert_type(b, jnp.uint32)
        return jnp.all(a_bits == b_bits)

    return jnp.all(jnp.stack(jax.tree.leaves(jax.tree.map(compare, one, other))))
