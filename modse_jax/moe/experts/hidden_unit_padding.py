"""Pads the hidden units of experts, so that kernels that work in full tiles take any width.

Every expert's width is rounded up to a multiple of the kernels' unit, in a copy of the weights that
is made each step. The added hidden units have weights of 0, so they add exactly 0 to the output and
to the gradient of the input; their own gradients are dropped. The copy is a gather, and so is its
gradient: every stored hidden unit occurs exactly once among the padded ones.

Legend: D model dimension, E experts of a shard, H hidden units of all experts of a shard, P the
same with padding.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modse_jax.moe import expert_placement, expert_widths


def pad_width(width: int, unit: int) -> int:
    """Returns the width rounded up to a multiple of the unit."""
    return -(-width // unit) * unit


def flops_ratio(widths: Sequence[int], unit: int) -> float:
    """Returns the FLOPs of padded experts relative to the exact widths, with balanced routing."""
    return sum(pad_width(w, unit) for w in widths) / sum(widths)


def pad_placement(placement: expert_placement.Placement, unit: int) -> expert_placement.Placement:
    """Rounds every width up to a multiple of the unit.

    Shards whose sums then differ are filled up with one more expert, to which no token is routed.
    """
    if all(w % unit == 0 for widths in placement.widths for w in widths):
        return placement
    padded = [tuple(pad_width(w, unit) for w in widths) for widths in placement.widths]
    largest = max(map(sum, padded))
    experts = []
    widths = []
    for shard_experts, shard_widths in zip(placement.experts, padded):
        missing = largest - sum(shard_widths)
        experts.append((*shard_experts, placement.num_experts) if missing else shard_experts)
        widths.append((*shard_widths, missing) if missing else shard_widths)
    return expert_placement.Placement(tuple(experts), tuple(widths))


def pad_experts(
    rows_E: jax.Array,
    weights: tuple[jax.Array, jax.Array, jax.Array],
    shard: jax.Array,
    placement: expert_placement.Placement,
    unit: int,
) -> tuple[jax.Array, tuple[jax.Array, ...], expert_placement.Placement]:
    """Pads every expert's width to a multiple of the unit.

    Nothing is copied if the widths are multiples already.

    Args:
      rows_E: tokens routed to each expert of the shard, filled up with 0 to placement.slots.
      weights: w_gate [D, H], w_up [D, H], w_down [H, D] of the shard.
      shard: int32 scalar. The tables of all shards are constants of one program.

    Returns:
      (rows_E, weights, placement) of the padded experts.
    """
    padded = pad_placement(placement, unit)
    if padded == placement:
        return rows_E, tuple(weights), placement
    tables = _make_tables(placement, padded)
    source = jnp.asarray(tables.source)[shard]
    target = jnp.asarray(tables.target)[shard]
    hidden_axes = (1, 1, 0)
    copies = tuple(_gather(w, source, target, axis) for w, axis in zip(weights, hidden_axes))
    padded_rows_E = jnp.pad(rows_E, (0, padded.slots - rows_E.shape[0]))
    return padded_rows_E, copies, padded


class _Tables(NamedTuple):
    """The correspondence of stored and padded hidden units, for every shard.

    Attributes:
      source: [shards, P], the stored hidden unit of every padded one; H, which is out of range, for
        those that padding adds.
      target: [shards, H], the padded hidden unit of every stored one.
    """

    source: np.ndarray
    target: np.ndarray


@functools.cache
def _make_tables(
    placement: expert_placement.Placement, padded: expert_placement.Placement
) -> _Tables:
    num_shards = len(placement.widths)
    num_hidden = sum(placement.widths[0])
    num_padded = sum(padded.widths[0])
    source = np.full((num_shards, num_padded), num_hidden, np.int32)
    target = np.zeros((num_shards, num_hidden), np.int32)
    for shard, widths in enumerate(placement.widths):
        firsts = expert_widths.offsets(widths)
        padded_firsts = expert_widths.offsets(padded.widths[shard])
        for width, first, padded_first in zip(widths, firsts, padded_firsts):
            source[shard, padded_first : padded_first + width] = np.arange(first, first + width)
            target[shard, first : first + width] = np.arange(padded_first, padded_first + width)
    return _Tables(source, target)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gather(w: jax.Array, source: jax.Array, target: jax.Array, axis: int) -> jax.Array:
    """Gathers hidden units, 0 where the source is out of range.

    JAX would derive a scatter as the gradient, which is slow on GPUs, and slower if it has to be
    deterministic. With `target` it is another gather.
    """
    return jnp.take(w, source, axis=axis, mode="fill", fill_value=0)


def _gather_forward(
    w: jax.Array, source: jax.Array, target: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array]:
    return _gather(w, source, target, axis), target


def _gather_backward(axis: int, target: jax.Array, dw: jax.Array) -> tuple[jax.Array, None, None]:
    return jnp.take(dw, target, axis=axis, mode="clip"), None, None


_gather.defvjp(_gather_forward, _gather_backward)
