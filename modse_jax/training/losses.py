"""Cross-entropy and z-loss over a large vocabulary without the logits of all positions in memory.

Legend: B batch, L length, C positions of L in a chunk, n chunks, P devices, D model dimension,
V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modse_jax.runtime import sharding


class VocabularyLosses(NamedTuple):
    """Losses of the logits over the vocabulary, float32. Only `total` has a gradient."""

    total: jax.Array  # cross_entropy + z_loss_weight * z_loss
    cross_entropy: jax.Array
    z_loss: jax.Array | None  # None if it has no weight


class _Sums(NamedTuple):
    """Sums over the chunks so far."""

    cross_entropy: jax.Array
    z_loss: jax.Array | None  # None if its weight is 0
    dw_PDV: jax.Array  # gradient of the output embedding, one for each device


def reference_cross_entropy(
    x_BLD: jax.Array, w_DV: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array
) -> jax.Array:
    """Computes the same as `cross_entropy`, with the logits of all positions in memory."""
    logits_BLV = jnp.einsum(
        "bld,dv->blv", x_BLD, w_DV.astype(x_BLD.dtype), preferred_element_type=jnp.float32
    )
    log_p_BLV = jax.nn.log_softmax(logits_BLV, axis=-1)
    return -jnp.sum(weights_BL * _select_targets(log_p_BLV, targets_BL))


def reference_vocabulary_losses(
    x_BLD: jax.Array,
    w_DV: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    z_loss_weight: float,
) -> VocabularyLosses:
    """Computes the same as `vocabulary_losses`, with the logits of all positions in memory."""
    logits_BLV = jnp.einsum(
        "bld,dv->blv", x_BLD, w_DV.astype(x_BLD.dtype), preferred_element_type=jnp.float32
    )
    cross_entropy = reference_cross_entropy(x_BLD, w_DV, targets_BL, weights_BL)
    z_loss = jnp.sum(weights_BL * jax.nn.logsumexp(logits_BLV, axis=-1) ** 2)
    return VocabularyLosses(cross_entropy + z_loss_weight * z_loss, cross_entropy, z_loss)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    x_BLD: jax.Array,
    w_DV: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    chunk: int,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Computes the sum over positions of weight * -log softmax(x W)[target], in nats, float32.

    If a gradient is requested, it is computed chunk by chunk in the same pass, so that logits are
    neither saved nor recomputed. On a mesh, the output embedding is all-gathered once and each
    device accumulates its own gradient, so that communication does not grow with the number of
    chunks.

    Args:
      x_BLD: final hidden states.
      w_DV: output embedding, float32; cast to the dtype of x for the matmuls.
      targets_BL: token ids.
      weights_BL: float32; not differentiated. Positions of weight 0 may hold NaN.
      chunk: positions whose logits a device holds at a time (rounded to a multiple of the rows).
      mesh: the mesh over whose P devices B is sharded. B is divisible by P.
    """
    nll_BL = nll(x_BLD, w_DV, targets_BL, chunk, mesh)
    return jnp.sum(jnp.where(weights_BL != 0, weights_BL * nll_BL, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def vocabulary_losses(
    x_BLD: jax.Array,
    w_DV: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    chunk: int,
    mesh: Mesh | None,
    z_loss_weight: float,
) -> VocabularyLosses:
    """Computes `cross_entropy` and the z-loss of the vocabulary in the same pass.

    The z-loss is the sum over positions of weight * logsumexp(x W)^2. It keeps the logits from
    drifting away from 0 (PaLM, arXiv 2204.02311, section 5).

    Args: as in `cross_entropy`. z_loss_weight: the weight of the z-loss in the total; above 0.
    """
    losses, _ = _forward_with_z_loss(
        x_BLD, w_DV, targets_BL, weights_BL, chunk, mesh, z_loss_weight
    )
    return losses


def nll(
    x_BLD: jax.Array,
    w_DV: jax.Array,
    targets_BL: jax.Array,
    chunk: int,
    mesh: Mesh | None = None,
    greedy: bool = False,
) -> Any:
    """Computes -log softmax(x W)[target] for every position, in nats, without a gradient.

    Args: as in `cross_entropy`. greedy: also returns if the target is the most likely token.

    Returns:
      float32 [B, L]; with `greedy` a pair of it and a bool array [B, L].
    """
    w_DV = _constrain(w_DV.astype(x_BLD.dtype), mesh, ())

    def score_chunk(_: None, chunk_inputs: tuple) -> tuple[None, Any]:
        x_BCD, targets_BC = chunk_inputs
        logits_BCV = _logits(x_BCD, w_DV)
        nll_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - _select_targets(logits_BCV, targets_BC)
        if not greedy:
            return None, nll_BC
        return None, (nll_BC, jnp.argmax(logits_BCV, axis=-1) == targets_BC)

    chunks = _split_into_chunks((x_BLD, targets_BL), chunk * _device_count(mesh))
    _, outputs = lax.scan(score_chunk, None, chunks)
    length = x_BLD.shape[1]
    return jax.tree.map(lambda array_nBC: _join_chunks(array_nBC, length), outputs)


def _forward(
    x_BLD: jax.Array,
    w_DV: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    chunk: int,
    mesh: Mesh | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns the cross-entropy, and its gradients with respect to x and W."""
    losses, gradients = _sum_chunks(x_BLD, w_DV, targets_BL, weights_BL, chunk, mesh, 0.0)
    return losses.cross_entropy, gradients


def _forward_with_z_loss(
    x_BLD: jax.Array,
    w_DV: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    chunk: int,
    mesh: Mesh | None,
    z_loss_weight: float,
) -> tuple[VocabularyLosses, tuple[jax.Array, jax.Array]]:
    """Returns the losses, and the gradients of their total with respect to x and W."""
    return _sum_chunks(x_BLD, w_DV, targets_BL, weights_BL, chunk, mesh, z_loss_weight)


def _sum_chunks(
    x_BLD: jax.Array,
    w_DV: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    chunk: int,
    mesh: Mesh | None,
    z_loss_weight: float,
) -> tuple[VocabularyLosses, tuple[jax.Array, jax.Array]]:
    """Returns the losses, and the gradients of their total with respect to x and W.

    Without a weight of the z-loss, the program is that of the cross-entropy alone.
    """
    w_cast_DV = _constrain(w_DV.astype(x_BLD.dtype), mesh, ())
    P = _device_count(mesh)

    def scan_chunk(sums: _Sums, chunk_inputs: tuple) -> tuple[_Sums, jax.Array]:
        x_BCD, targets_BC, weights_BC = chunk_inputs
        x_BCD = jnp.where(weights_BC[:, :, None] != 0, x_BCD, 0)
        nll_BC, lse_BC, dlogits_BCV = _nll_and_gradient(
            x_BCD, w_cast_DV, targets_BC, weights_BC, z_loss_weight
        )
        dx_BCD = jnp.einsum("bcv,dv->bcd", dlogits_BCV, w_cast_DV)
        dw_PDV = sums.dw_PDV + jnp.einsum(
            "pbcd,pbcv->pdv",
            _split_by_device(x_BCD, P),
            _split_by_device(dlogits_BCV, P),
            preferred_element_type=jnp.float32,
        )
        dw_PDV = _constrain(dw_PDV, mesh, ("batch",))
        z_loss = sums.z_loss
        if z_loss is not None:
            z_loss += jnp.sum(weights_BC * lse_BC * lse_BC)
        cross_entropy = sums.cross_entropy + jnp.sum(weights_BC * nll_BC)
        return _Sums(cross_entropy, z_loss, dw_PDV), dx_BCD

    initial = _Sums(
        cross_entropy=jnp.zeros((), jnp.float32),
        z_loss=jnp.zeros((), jnp.float32) if z_loss_weight else None,
        dw_PDV=_constrain(jnp.zeros((P, *w_DV.shape), jnp.float32), mesh, ("batch",)),
    )
    chunks = _split_into_chunks((x_BLD, targets_BL, weights_BL), chunk * P)
    sums, dx_nBCD = lax.scan(scan_chunk, initial, chunks)
    dx_BLD = _join_chunks(dx_nBCD, x_BLD.shape[1])
    dw_DV = _sum_over_devices(sums.dw_PDV, mesh).astype(w_DV.dtype)
    total = sums.cross_entropy
    if sums.z_loss is not None:
        total += z_loss_weight * sums.z_loss
    return VocabularyLosses(total, sums.cross_entropy, sums.z_loss), (dx_BLD, dw_DV)


def _nll_and_gradient(
    x_BCD: jax.Array,
    w_DV: jax.Array,
    targets_BC: jax.Array,
    weights_BC: jax.Array,
    z_loss_weight: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the negative log-likelihood, logsumexp, and the gradient with respect to logits.

    The gradient of logsumexp^2 is 2 * logsumexp * softmax.
    """
    logits_BCV = _logits(x_BCD, w_DV)
    lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    nll_BC = lse_BC - _select_targets(logits_BCV, targets_BC)
    one_hot_BCV = targets_BC[:, :, None] == jnp.arange(w_DV.shape[1])[None, None, :]
    p_BCV = jnp.exp(logits_BCV - lse_BC[:, :, None])
    if z_loss_weight:
        p_BCV = p_BCV * (1 + 2 * z_loss_weight * lse_BC)[:, :, None]
    dlogits_BCV = (p_BCV - one_hot_BCV) * weights_BC[:, :, None]
    return nll_BC, lse_BC, dlogits_BCV.astype(x_BCD.dtype)


def _backward(
    chunk: int, mesh: Mesh | None, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    dx_BLD, dw_DV = saved
    return (g * dx_BLD).astype(dx_BLD.dtype), g * dw_DV, None, None


def _backward_with_z_loss(
    chunk: int,
    mesh: Mesh | None,
    z_loss_weight: float,
    saved: tuple[jax.Array, jax.Array],
    g: VocabularyLosses,
) -> tuple[jax.Array, jax.Array, None, None]:
    return _backward(chunk, mesh, saved, g.total)


cross_entropy.defvjp(_forward, _backward)
vocabulary_losses.defvjp(_forward_with_z_loss, _backward_with_z_loss)


def _sum_over_devices(dw_PDV: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Sums the gradients of all devices.

    First a reduce-scatter over the devices that share a copy of the parameters, which leaves each
    with its own part; then an all-reduce of the parts over the copies.
    """
    if mesh is None:
        return dw_PDV[0]
    head_axes = sharding.partition_spec(sharding.PARAMETER_AXES["head"])
    parts = NamedSharding(mesh, PartitionSpec(sharding.DATA, *head_axes))
    dw_PDV = dw_PDV.reshape(mesh.shape[sharding.DATA], -1, *dw_PDV.shape[1:])
    return jnp.sum(lax.with_sharding_constraint(jnp.sum(dw_PDV, axis=1), parts), axis=0)


def _device_count(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.size


def _constrain(array: jax.Array, mesh: Mesh | None, logical_axes: tuple[str, ...]) -> jax.Array:
    if mesh is None:
        return array
    target = NamedSharding(mesh, sharding.partition_spec(logical_axes))
    return lax.with_sharding_constraint(array, target)


def _logits(x_BCD: jax.Array, w_DV: jax.Array) -> jax.Array:
    return jnp.einsum("bcd,dv->bcv", x_BCD, w_DV, preferred_element_type=jnp.float32)


def _select_targets(values_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    """Returns the value of each position's target token, [B, C]."""
    return jnp.take_along_axis(values_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]


def _split_by_device(array: jax.Array, devices: int) -> jax.Array:
    """Returns an array [B, ...] as [P, B / P, ...]."""
    return array.reshape(devices, -1, *array.shape[1:])


def _split_into_chunks(arrays: tuple[jax.Array, ...], chunk: int) -> tuple[jax.Array, ...]:
    """Returns arrays [B, L, ...] as [n, B, C, ...], padded with zeros to n * C positions.

    The arrays are split along L so that B can be sharded. C * B is about `chunk`.
    """
    B, L = arrays[0].shape[:2]
    C = max(1, min(L, chunk // B))
    n = -(-L // C)

    def split(array: jax.Array) -> jax.Array:
        trailing = array.shape[2:]
        padding = ((0, 0), (0, n * C - L)) + ((0, 0),) * len(trailing)
        padded = jnp.pad(array, padding)
        return jnp.moveaxis(padded.reshape(B, n, C, *trailing), 1, 0)

    return tuple(split(array) for array in arrays)


def _join_chunks(array: jax.Array, length: int) -> jax.Array:
    """Returns an array [n, B, C, ...] as [B, L, ...], without padding."""
    n, B, C = array.shape[:3]
    return jnp.moveaxis(array, 0, 1).reshape(B, n * C, *array.shape[3:])[:, :length]
