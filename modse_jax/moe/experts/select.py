"""The grouped gated feed-forward product over experts of unequal width: signature, slow reference, choice of backend.

Expert e owns columns offset[e] : offset[e] + width[e] of the flat hidden axis H = sum of widths, so parameters are
exact: no padding to the widest. E_e(x) = (silu(x W_gate) * (x W_up)) W_down (SwiGLU, no biases).

Legend: N routed rows, D model, E experts, H flat hidden axis.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from modse_jax.moe import expert_ffn_virtual, expert_placement
from modse_jax.moe.experts import pallas_gpu, pallas_tpu
from modse_jax.moe.experts.blocked import Blocks, blocked
from modse_jax.moe.experts.expert_weights import ExpertWeights
from modse_jax.moe.experts.reference import reference

KERNELS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}


def check_backend(
    backend: str,
    placement: expert_placement.Placement,
    shape: tuple[int, int],
    chip: str,
    dtype: str,
    fused: bool,
) -> None:
    """Raises ValueError, naming what would do, where a backend cannot multiply rows of a shape [N, D] and this type
    with these widths on this chip (mesh.chip). fused: whether XLA multiplies groups in one kernel there
    (expert_ffn_virtual.fused)."""
    if backend in KERNELS:
        checked_tiles(backend, placement, shape, chip, dtype)
    if backend == "virtual":
        for widths in placement.widths:
            expert_ffn_virtual.chunk(widths)
        if not fused:
            raise ValueError(
                f"moe.backend=virtual: on this {chip} XLA expands a grouped product (lax.ragged_dot) into "
                "one of every row with every expert; backends that run anywhere: auto, blocked, reference"
            )


def checked_tiles(backend, placement, shape, chip, dtype):
    """Of a kernel backend. Raises ValueError where it does not take the rows."""
    widths = [w for widths in placement.widths for w in widths]
    tiles = KERNELS[backend].tiles_for(widths, shape[1], chip, dtype)
    KERNELS[backend].check_tasks(shape[0], placement, tiles)
    return tiles


def select_backend(
    backend: str,
    placement: expert_placement.Placement,
    shape: tuple[int, int],
    chip: str,
    dtype: str,
) -> tuple[str, str]:
    """(the backend of a product over rows of a shape [N, D], why "auto" does not take kernels where a chip has them).
    "auto" is pallas_tpu on chips and widths that it takes, since `blocked` takes minutes to compile there (LOG.md);
    else "blocked": nothing else has been measured."""
    if backend != "auto":
        return backend, ""
    if chip not in pallas_tpu.TILINGS:
        return "blocked", ""
    try:
        checked_tiles("pallas_tpu", placement, shape, chip, dtype)
    except ValueError as error:
        return "blocked", str(error)
    return "pallas_tpu", ""


def self_test_kernels(
    backend: str,
    placement: expert_placement.Placement,
    dim: int,
    chip: str,
    dtype: str,
    interpret=False,
) -> None:
    """Runs a backend's kernels on this device, over some random rows of these widths, against the reference: outputs
    and gradients, rows that belong to nobody, an expert with many rows, one without. Raises RuntimeError where they
    differ by more than bfloat16 explains."""
    module = KERNELS[backend]
    widths, tiles = placement.widths[0], checked_tiles(backend, placement, (0, dim), chip, dtype)
    # None, few, many that begin anywhere, a whole tile, few again: as much of it as there are experts.
    rows = [0, 7, module.check_rows(tiles), tiles.rows, *range(1, len(widths))]
    rows_E = np.zeros(placement.slots, np.int64)
    rows_E[: len(widths)] = rows[max(0, 3 - len(widths)) :][: len(widths)]
    N = -(-int(rows_E.sum()) // 8) * 8 + 8
    keys = jax.random.split(jax.random.key(0), 5)
    x_ND, dy_ND = (jax.random.normal(k, (N, dim), dtype) for k in keys[:2])
    x_ND = jnp.where(jnp.arange(N)[:, None] < rows_E.sum(), x_ND, jnp.nan)
    weights = ExpertWeights(
        *(
            0.05 * jax.random.normal(k, s, dtype)
            for k, s in zip(keys[2:], ((dim, sum(widths)), (dim, sum(widths)), (sum(widths), dim)))
        )
    )

    def kernels(x, w):
        rows, kernel = jnp.asarray(rows_E, jnp.int32), getattr(module, backend)
        return kernel(x, rows, *w, jnp.int32(0), placement, tiles, interpret)

    def slow(x, w):
        return reference(x, jnp.asarray(rows_E), w, widths)

    def both(function):
        y, pull = jax.vjp(function, x_ND, weights)
        return jax.tree.leaves((y, pull(dy_ND)))

    for name, got, want in zip(
        ("y", "dx", *ExpertWeights._fields),
        *(jax.jit(lambda f=f: both(f))() for f in (kernels, slow)),
    ):
        got, want = (np.asarray(a, np.float32) for a in (got, want))
        norm = np.linalg.norm(want)
        error = np.linalg.norm(got - want) / norm
        if not (
            error < 0.02 and np.abs(got - want).max() < 0.3 * norm / want.size**0.5
        ):  # no tile may be amiss
            raise RuntimeError(
                f"the kernels of {backend} are wrong on this device: {name} differs from the reference "
                f"by {error:.3g} of its norm, {np.abs(got - want).max():.3g} at most; train with "
                "--config.moe.backend=blocked, and report it"
            )


def expert_ffn(
    x_ND: jax.Array,
    rows_E: jax.Array,
    weights: ExpertWeights,
    placement: expert_placement.Placement,
    backend: str,
    blocks: Blocks,
    chip: str,
    shard: jax.Array | int = 0,
) -> jax.Array:
    """y_ND: every row through its own expert.

    Args:
      x_ND: rows sorted by expert. rows_E: int32, how many rows each expert has; rows past their sum belong to nobody,
        may hold anything, NaN included, and come back as 0 (their gradient too).
      weights: float32 or x's type; products are taken in x's type and accumulated in float32.
      placement: static, of all shards; sizing.place(widths, 1, "pairs") for one. rows_E and the weights are those
        of `shard`: its experts in the placement's order, rows_E filled up with 0 to placement.slots.
      backend: moe.backend; see `chosen` for "auto". blocks: how `blocked` cuts the work. chip: mesh.chip.
    Raises: ValueError where the widths do not add up to the flat axis, or the backend cannot run them, or so many rows,
      on the chip.
    """
    if {sum(w) for w in placement.widths} != {
        weights.w_gate.shape[1]
    } or placement.slots != rows_E.shape[0]:
        raise ValueError(
            f"widths {placement.widths} do not fit weights {weights.w_gate.shape} and rows {rows_E.shape}"
        )
    weights = ExpertWeights(*(w.astype(x_ND.dtype) for w in weights))
    shard = jnp.asarray(shard, jnp.int32)
    backend, _ = select_backend(backend, placement, x_ND.shape, chip, str(x_ND.dtype))
    if backend in KERNELS:
        tiles = checked_tiles(backend, placement, x_ND.shape, chip, str(x_ND.dtype))
        return getattr(KERNELS[backend], backend)(x_ND, rows_E, *weights, shard, placement, tiles)
    if backend in ("reference", "virtual"):
        way = reference if backend == "reference" else expert_ffn_virtual.virtual
        ways = [functools.partial(way, widths=widths) for widths in placement.widths]
        return jax.lax.switch(shard, ways, x_ND, rows_E, weights)
    return blocked(x_ND, rows_E, *weights, shard, placement, blocks, chip)
