"""Properties of a training state that its checkpoint records, to verify the state when restored.

These are the names, shapes, dtypes and fingerprints of its arrays. This module also converts hidden
units to and from the canonical order, in which checkpoints store them. None of it depends on the
mesh.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modse_jax.errors import UserError
from modse_jax.runtime import sharding
from modse_jax.training import fingerprints
from modse_jax.training.train_step import State


def describe_arrays(state: State) -> dict[str, list]:
    """Returns {path in the tree: [shape, dtype]} for every array of a state, or of its shapes."""
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in _named_leaves(state)}


def check_arrays(step: int, saved: dict[str, list], expected: dict[str, list]) -> None:
    """Checks that a checkpoint has the arrays that the model of this run needs.

    Args:
      step: the step of the checkpoint, for the error message.
      saved: the arrays of the checkpoint; see `describe_arrays`.
      expected: the arrays of the model's state; see `describe_arrays`.

    Raises:
      UserError: names, shapes or types differ.
    """
    if len(saved) != len(expected):
        raise UserError(
            f"checkpoint {step} has {len(saved)} arrays, but the model has {len(expected)}"
        )
    differences = [
        f"{name} is {saved.get(name)} in the checkpoint and {description} in the model"
        for name, description in expected.items()
        if saved.get(name) != description
    ]
    if differences:
        raise UserError(f"checkpoint {step} does not fit the model: {'; '.join(differences[:5])}")


def compute_fingerprints(
    state: State, checkpoint_format: int = fingerprints.FORMAT
) -> dict[str, int]:
    """Returns {path in the tree: fingerprint} for every array of a state.

    A fingerprint is a hash that does not depend on the sharding of the array. It is compared after
    a restore, to detect that an array is not what was saved.

    Args:
      state: the state.
      checkpoint_format: the format of the checkpoint that the fingerprints are compared with, a key
        of `fingerprints.FINGERPRINTS`.
    """
    names, arrays = zip(*_named_leaves(state))
    values = jax.device_get(_fingerprint_all(list(arrays), checkpoint_format))
    return {name: int(value) for name, value in zip(names, values)}


def all_finite(state: State) -> bool:
    """Returns True if no parameter, optimizer moment or router bias is infinite or NaN."""
    leaves = jax.tree.leaves((state.params, state.opt_state, state.router_bias))
    return bool(_all_finite(leaves))


def to_canonical_order(state: State, order: Sequence[int]) -> State:
    """Sorts the hidden units of all experts by expert, the canonical order of checkpoints.

    In memory they are ordered by the device that holds them. In canonical order they can be
    restored on any mesh.

    Args:
      state: the state of a run.
      order: the canonical index of each hidden unit in memory, from
        `expert_placement.hidden_unit_order`; () if they are sorted already.
    """
    return take_hidden_units(state, np.argsort(np.array(order, np.int32)))


def from_canonical_order(state: State, order: Sequence[int]) -> State:
    """Reverses `to_canonical_order`."""
    return take_hidden_units(state, order)


def take_hidden_units(state: State, indices: Sequence[int] | np.ndarray) -> State:
    """Returns the state with hidden unit `indices[i]` at index i, in every array that has them.

    () leaves the state unchanged.
    """
    indices = np.array(indices, np.int32)
    if np.array_equal(indices, np.arange(len(indices))):
        return state

    def reorder(path: tuple, leaf: jax.Array) -> jax.Array:
        # One array at a time, so that memory never holds a second copy of all of the state.
        axis = sharding.flat_axis_of(str(getattr(path[-1], "key", "")))
        if axis is None:
            return leaf
        take = functools.partial(jnp.take, axis=axis)
        return jax.jit(take, out_shardings=leaf.sharding)(leaf, indices)

    return jax.tree_util.tree_map_with_path(reorder, state)


@jax.jit
def _all_finite(arrays: list[jax.Array]) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(array)) for array in arrays]))


@functools.partial(jax.jit, static_argnums=1)
def _fingerprint_all(arrays: list[jax.Array], checkpoint_format: int) -> list[jax.Array]:
    return [fingerprints.FINGERPRINTS[checkpoint_format](array) for array in arrays]


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    return [
        ("/".join(_key_name(key) for key in path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
