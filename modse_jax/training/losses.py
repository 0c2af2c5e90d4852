"""Cross-entropy over a large vocabulary without holding all logits.

Legend: B batch, L length, C columns of L in a chunk, P devices, D model, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modse_jax.runtime import sharding


def reference_cross_entropy(x_BLD, w_DV, targets_BL, weights_BL):
    """The same as `cross_entropy`, with all logits at once."""
    logits_BLV = jnp.einsum(
        "bld,dv->blv", x_BLD, w_DV.astype(x_BLD.dtype), preferred_element_type=jnp.float32
    )
    log_p_BLV = jax.nn.log_softmax(logits_BLV, axis=-1)
    return -jnp.sum(
        weights_BL * jnp.take_along_axis(log_p_BLV, targets_BL[:, :, None], axis=-1)[:, :, 0]
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(x_BLD, w_DV, targets_BL, weights_BL, chunk: int, mesh: Mesh | None = None):
    """Sum over positions of weight * -log softmax(x W)[target], nats, float32.

    Args: x_BLD: final hidden states. w_DV: output embedding, float32, used in x's type. weights_BL: float32, not
      differentiated. chunk: positions whose logits a device holds at a time (rounded to whole columns of L). mesh: over
      whose devices, P, B is spread: P divides it.
    With a gradient asked for, it is computed chunk by chunk in the same pass, so no logits are kept or recomputed. On a
    mesh, the weights are gathered once, and every device sums up a gradient of its own: what is sent does not grow with
    the number of chunks.
    """
    nll_BL = nll(x_BLD, w_DV, targets_BL, chunk, mesh)
    return jnp.sum(jnp.where(weights_BL != 0, weights_BL * nll_BL, 0))


def nll(x_BLD, w_DV, targets_BL, chunk: int, mesh: Mesh | None = None, greedy: bool = False):
    """-log softmax(x W)[target] of every position, [B, L], nats, float32; with `greedy` a pair, with whether the target
    is the likeliest. No gradient."""
    w_DV = _constrained(w_DV.astype(x_BLD.dtype), mesh, ())

    def one(_, piece):
        x_BCD, targets_BC = piece
        logits_BCV = _logits(x_BCD, w_DV)
        nll_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - _at(logits_BCV, targets_BC)
        return None, (nll_BC, jnp.argmax(logits_BCV, axis=-1) == targets_BC) if greedy else nll_BC

    L = x_BLD.shape[1]
    _, out = lax.scan(one, None, _chunks((x_BLD, targets_BL), chunk * _devices(mesh)))
    return jax.tree.map(lambda a_nBC: _unchunk(a_nBC, L), out)


def _forward(x_BLD, w_DV, targets_BL, weights_BL, chunk, mesh):
    w, P = _constrained(w_DV.astype(x_BLD.dtype), mesh, ()), _devices(mesh)

    def one(carry, piece):
        loss, dw_PDV = carry
        x_BCD, targets_BC, weights_BC = piece
        x_BCD = jnp.where(weights_BC[:, :, None] != 0, x_BCD, 0)
        logits_BCV = _logits(x_BCD, w)
        lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        nll_BC = lse_BC - _at(logits_BCV, targets_BC)
        hot_BCV = targets_BC[:, :, None] == jnp.arange(w.shape[1])[None, None, :]
        dlogits_BCV = (jnp.exp(logits_BCV - lse_BC[:, :, None]) - hot_BCV) * weights_BC[:, :, None]
        dlogits_BCV = dlogits_BCV.astype(x_BCD.dtype)
        dx_BCD = jnp.einsum("bcv,dv->bcd", dlogits_BCV, w)
        dw_PDV += jnp.einsum(
            "pbcd,pbcv->pdv",
            *(a.reshape(P, -1, *a.shape[1:]) for a in (x_BCD, dlogits_BCV)),
            preferred_element_type=jnp.float32,
        )
        return (loss + jnp.sum(weights_BC * nll_BC), _constrained(dw_PDV, mesh, ("batch",))), dx_BCD

    carry = (
        jnp.zeros((), jnp.float32),
        _constrained(jnp.zeros((P, *w_DV.shape), jnp.float32), mesh, ("batch",)),
    )
    (loss, dw_PDV), dx_nBCD = lax.scan(
        one, carry, _chunks((x_BLD, targets_BL, weights_BL), chunk * P)
    )
    return loss, (_unchunk(dx_nBCD, x_BLD.shape[1]), _summed(dw_PDV, mesh).astype(w_DV.dtype))


def _backward(chunk, mesh, saved, g):
    dx_BLD, dw_DV = saved
    return (g * dx_BLD).astype(dx_BLD.dtype), g * dw_DV, None, None


cross_entropy.defvjp(_forward, _backward)


def _summed(dw_PDV, mesh):
    """Over devices. First over those that share the weights, so that each gets its part; then the parts over copies."""
    if mesh is None:
        return dw_PDV[0]
    parts = NamedSharding(
        mesh,
        PartitionSpec(sharding.DATA, *sharding.partition_spec(sharding.PARAMETER_AXES["head"])),
    )
    dw_PDV = dw_PDV.reshape(mesh.shape[sharding.DATA], -1, *dw_PDV.shape[1:])
    return jnp.sum(lax.with_sharding_constraint(jnp.sum(dw_PDV, axis=1), parts), axis=0)


def _devices(mesh):
    return 1 if mesh is None else mesh.size


def _constrained(array, mesh, meanings):
    return (
        array
        if mesh is None
        else lax.with_sharding_constraint(
            array, NamedSharding(mesh, sharding.partition_spec(meanings))
        )
    )


def _logits(x_BCD, w_DV):
    return jnp.einsum("bcd,dv->bcv", x_BCD, w_DV, preferred_element_type=jnp.float32)


def _at(logits_BCV, targets_BC):
    return jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]


def _chunks(arrays, chunk):
    """Arrays [B, L, ...] as [n, B, L / n, ...], padded with zeros: cut along L, so that B may be sharded."""
    B, L = arrays[0].shape[:2]
    columns = max(1, min(L, chunk // B))
    n = -(-L // columns)

    def cut(array):
        array = jnp.pad(array, ((0, 0), (0, n * columns - L)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(array.reshape(B, n, columns, *array.shape[2:]), 1, 0)

    return tuple(cut(a) for a in arrays)


def _unchunk(array, length):
    n, B, columns = array.shape[:3]
    return jnp.moveaxis(array, 0, 1).reshape(B, n * columns, *array.shape[3:])[:, :length]
