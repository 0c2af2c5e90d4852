"""The lookup of token embeddings, with a gradient that is deterministic and fast on GPU.

Legend: B batch, L length, N = B * L tokens, S tokens of one chunk, D model (or one shard of it),
V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modse_jax.runtime import chips, sharding

# Tokens of one matmul of the gradient on GPU. The one-hot matrix [V, CHUNK] takes 262 MB in
# bfloat16 at a vocabulary of 32,000; with smaller chunks, the sum is read and written more often.
CHUNK = 4096


def look_up(
    table_VD: jax.Array,
    tokens_BL: jax.Array,
    dtype: jnp.dtype,
    scale: float,
    mesh: Mesh | None,
    with_matmul: bool | None = None,
) -> jax.Array:
    """Returns `scale` times the embeddings of the tokens, [B, L, D] in the compute dtype.

    On GPU the gradient is a sum of matmuls with one-hot matrices. XLA's gradient of a gather is a
    scatter-add, which is not deterministic there. With `training.deterministic` XLA replaces it by
    a sort of one (row, value, index) triple per element of [N, D] and by a scan of the same length:
    about 0.1 s for 65,536 tokens of width 1,536. Other platforms keep XLA's gradient.

    The embedding table is sharded over the model dimension. Every device looks up its slice of the
    model dimension, for the tokens of all devices that hold slices of the same table. The result is
    sharded over the model dimension in the same way, and over `data` along the batch.

    Args:
        table_VD: the embedding table.
        tokens_BL: token ids.
        dtype: the compute dtype.
        scale: the factor.
        mesh: the devices; None for one device.
        with_matmul: True for the gradient by matmuls, False for that of XLA; None selects it by the
            platform.
    """
    if with_matmul is None:
        with_matmul = chips.is_gpu(sharding.chip_name(mesh))
    if mesh is None:
        look_up_here = look_up_with_matmul_gradient if with_matmul else look_up_with_gather
        return look_up_here(table_VD, tokens_BL, dtype, scale)

    rows, width = PartitionSpec(sharding.DATA), sharding.AXIS_RULES["embed"]
    tokens_BL = jax.lax.with_sharding_constraint(tokens_BL, NamedSharding(mesh, rows))
    if with_matmul:
        # With a shard_map, the gradient is all-reduced over `data` once. Without it, XLA would
        # all-reduce the gradient of every chunk.
        x_BLD = jax.shard_map(
            lambda table_VD, tokens_BL: look_up_with_matmul_gradient(
                table_VD, tokens_BL, dtype, scale
            ),
            mesh=mesh,
            in_specs=(PartitionSpec(None, width), rows),
            out_specs=PartitionSpec(sharding.DATA, None, width),
            check_vma=False,
        )(table_VD, tokens_BL)
    else:
        x_BLD = look_up_with_gather(table_VD, tokens_BL, dtype, scale)
    layout = NamedSharding(mesh, PartitionSpec(sharding.DATA, None, width))
    return jax.lax.with_sharding_constraint(x_BLD, layout)


def look_up_with_gather(
    table_VD: jax.Array, tokens_BL: jax.Array, dtype: jnp.dtype, scale: float
) -> jax.Array:
    """Returns the scaled embeddings [B, L, D] by a gather, with XLA's own gradient.

    It is the plain reference for `look_up_with_matmul_gradient`.
    """
    x_BLD = table_VD[tokens_BL]
    return (x_BLD * scale if scale != 1 else x_BLD).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def look_up_with_matmul_gradient(
    table_VD: jax.Array, tokens_BL: jax.Array, dtype: jnp.dtype, scale: float, chunk: int = CHUNK
) -> jax.Array:
    """Returns the scaled embeddings [B, L, D] by a gather whose gradient is a sum of matmuls.

    The gradient of the table is onehot(tokens) @ dx, computed for `chunk` tokens at a time and
    summed in float32 in the order of the tokens, so it is deterministic.
    """
    return look_up_with_gather(table_VD, tokens_BL, dtype, scale)


def _forward(
    table_VD: jax.Array, tokens_BL: jax.Array, dtype: jnp.dtype, scale: float, chunk: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # The table is saved for its shape and type alone. It is a parameter, so this takes no memory.
    return look_up_with_gather(table_VD, tokens_BL, dtype, scale), (tokens_BL, table_VD)


def _backward(
    dtype: jnp.dtype,
    scale: float,
    chunk: int,
    saved: tuple[jax.Array, jax.Array],
    gradient_BLD: jax.Array,
) -> tuple[jax.Array, None]:
    tokens_BL, table_VD = saved
    V, D = table_VD.shape
    tokens_N, gradient_ND = tokens_BL.reshape(-1), gradient_BLD.reshape(-1, D)
    chunk = min(chunk, tokens_N.size)
    padding = -tokens_N.size % chunk
    # Tokens are padded to full chunks with token 0 and a gradient of 0, which changes nothing.
    tokens_N = jnp.pad(tokens_N, (0, padding))
    gradient_ND = jnp.pad(gradient_ND, ((0, padding), (0, 0)))

    def add_chunk(sum_VD: jax.Array, piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        tokens_S, gradient_SD = piece
        one_hot_VS = (jnp.arange(V)[:, None] == tokens_S[None, :]).astype(gradient_SD.dtype)
        return sum_VD + jnp.dot(
            one_hot_VS, gradient_SD, precision="highest", preferred_element_type=jnp.float32
        ), None

    pieces = tokens_N.reshape(-1, chunk), gradient_ND.reshape(-1, chunk, D)
    sum_VD, _ = jax.lax.scan(add_chunk, jnp.zeros((V, D), jnp.float32), pieces)
    return (sum_VD * scale if scale != 1 else sum_VD).astype(table_VD.dtype), None


look_up_with_matmul_gradient.defvjp(_forward, _backward)
