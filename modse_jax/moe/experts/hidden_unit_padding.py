"""Pads experts to more hidden units, so that kernels that only compute full tiles take any width.

Every expert's width is rounded up to a multiple of the number of hidden units in a tile (the unit),
in a copy of the weights that is made each step. The added hidden units have weights of 0, so they
add exactly 0 to the output and to the gradient of the input; their own gradients are dropped. The
copy is a gather, and so is its gradient, because every stored hidden unit occurs exactly once among
the padded ones.

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
    """Returns the FLOPs of padded experts divided by those of exact widths, with balanced routing.

    1.1 means that padding costs 10% more.
    """
    return sum(pad_width(w, unit) for w in widths) / sum(widths)


def pad_placement(placement: expert_placement.Placement, unit: int) -> expert_placement.Placement:
    """Returns the placement with every width rounded up to a multiple of the unit.

    All shards must have equally many hidden units. If the rounded widths of a shard sum to less
    than those of another shard, it gets one more expert, to which no token is routed.
    """
    if all(w % unit == 0 for widths in placement.widths for w in widths):
        return placement
    padded = [tuple(pad_width(w, unit) for w in widths) for widths in placement.widths]
    largest = max(map(sum, padded))
    added_expert = 1 + max(expert for shard in placement.experts for expert in shard)
    experts = []
    widths = []
    for shard_experts, shard_widths in zip(placement.experts, padded):
        missing = largest - sum(shard_widths)
        experts.append((*shard_experts, added_expert) if missing else shard_experts)
        widths.append((*shard_widths, missing) if missing else shard_widths)
    return expert_placement.Placement(tuple(experts), tuple(widths))


def pad_experts(
    rows_E: jax.Array,
    weights: tuple[jax.Array, jax.Array, jax.Array],
    shard: jax.Array,
    placement: expert_placement.Placement,
    unit: int,
) -> tuple[jax.Array, tuple[jax.Array, ...], expert_placement.Placement]:
    """Pads every expert's width to a multiple of the unit, by a copy of the weights.

    If all widths are multiples already, the arguments are returned and nothing is copied.

    Args:
      rows_E: tokens routed to each expert of the shard. All shards have arrays of one length,
        placement.slots; a shard with fewer experts has zeros at the end.
      weights: w_gate [D, H], w_up [D, H], w_down [H, D] of the shard.
      shard: int32 scalar, the shard that this device holds. All devices run the same compiled
        program, so the tables of all shards are constants in it, indexed by `shard`.
      placement: the experts and widths of all shards.
      unit: the number of hidden units of which every width becomes a multiple.

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
    """Positions of the hidden units of each shard before padding (stored) and after it (padded).

    Attributes:
      source: int32 [shards, P], the stored index of every padded hidden unit. It is H, which is out
        of range, for the units that padding adds.
      target: int32 [shards, H], the padded index of every stored hidden unit.
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
    """Returns the padded copy of a weight: w[source] along `axis`, 0 if the source is out of range.

    JAX would derive a scatter as the gradient, which is slow on GPUs, and slower if it has to be
    deterministic. The custom gradient is another gather, dw[target].

    Args:
      w: a weight with H hidden units along `axis`.
      source, target: the rows of `_Tables` for one shard.
      axis: the hidden axis of w.
    """
    return jnp.take(w, source, axis=axis, mode="fill", fill_value=0)


def _gather_forward(
    w: jax.Array, source: jax.Array, target: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array]:
    return _gather(w, source, target, axis), target


def _gather_backward(axis: int, target: jax.Array, dw: jax.Array) -> tuple[jax.Array, None, None]:
    return jnp.take(dw, target, axis=axis, mode="clip"), None, None


_gather.defvjp(_gather_forward, _gather_backward)
