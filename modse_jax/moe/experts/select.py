"""The grouped gated feed-forward product over experts of unequal width: signature, slow reference, choice of backend.

Expert e owns columns offset[e] : offset[e] + width[e] of the flat hidden axis H = sum of widths, so parameters are
exact: no padding to the widest. E_e(x) = (silu(x W_gate) * (x W_up)) W_down (SwiGLU, no biases).

Legend: N routed rows, D model, E experts, H flat hidden axis.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from modse_jax.moe import expert_placement
from modse_jax.moe.experts import chunks, hidden_unit_padding, pallas_gpu, pallas_tpu, pallas_triton
from modse_jax.moe.experts.block_sizes import Blocks
from modse_jax.moe.experts.blocked import blocked
from modse_jax.moe.experts.expert_weights import ExpertWeights
from modse_jax.moe.experts.reference_ffn import reference

KERNELS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu, "pallas_triton": pallas_triton}


MAX_PADDING = 1.5  # "auto" takes no kernels that would need more than 1.5 times the FLOPs because of padded widths


def check_backend(
    backend: str,
    placement: expert_placement.Placement,
    shape: tuple[int, int],
    chip: str,
    dtype: str,
) -> None:
    """Raises ValueError, naming what would do, where a backend cannot multiply rows of a shape [N, D] and this type
    with these widths on this chip (mesh.chip)."""
    if backend in KERNELS:
        checked_tiles(backend, placement, shape, chip, dtype)


def checked_tiles(backend, placement, shape, chip, dtype):
    """(tiles, unit) of a kernel backend: every width is padded to a multiple of the unit (expert_padding). Raises
    ValueError if the backend does not take the job."""
    module, widths = KERNELS[backend], _all_widths(placement)
    tiles, unit = (
        module.tiles_for(widths, shape[1], chip, dtype),
        module.unit_for(widths, chip, dtype),
    )
    module.check_tasks(shape[0], hidden_unit_padding.pad_placement(placement, unit), tiles)
    return tiles, unit


def _all_widths(placement):
    return [w for widths in placement.widths for w in widths]


def select_backend(
    backend: str,
    placement: expert_placement.Placement,
    shape: tuple[int, int],
    chip: str,
    dtype: str,
) -> tuple[str, str]:
    """Returns the backend for routed tokens of a shape [N, D], and a note for the user.

    "auto" follows a written rule:
      TPUs: pallas_tpu, because `blocked` takes minutes to compile there (LOG.md).
      A100, H100, H200, B200 in bfloat16 or float16: pallas_triton. The rule comes from published timings of other
        grouped matmuls on an H100 (tokamax's shipped autotuning results): 650 TFLOP/s forward and 460 to 595 for weight
        gradients through Triton, 410 to 480 and 100 to 119 through Mosaic. Our own kernels have not been timed on
        hardware. A run checks them on its own device before it uses them (check_kernels).
      Otherwise, and if the kernels refuse the job or need more than MAX_PADDING times the FLOPs: blocked.

    The note says why "auto" does not take the kernels that the chip has, or how much the kernels pad; else it is empty.
    """
    kernels = backend
    if backend == "auto":
        kernels = next(
            (
                name
                for name, chips in (
                    ("pallas_tpu", pallas_tpu.TILINGS),
                    ("pallas_triton", pallas_triton.CHIPS),
                )
                if chip in chips
            ),
            "blocked",
        )
    if kernels not in KERNELS:
        return kernels, ""
    try:
        ratio, note = padding(kernels, placement, shape, chip, dtype)
    except ValueError as error:
        if backend == "auto":
            return "blocked", str(error)
        return kernels, ""  # check_backend reports it
    if backend == "auto" and ratio > MAX_PADDING:
        return "blocked", f"{kernels} would need {ratio:.1f} times the FLOPs: {note}"
    return kernels, note


def padding(
    backend: str,
    placement: expert_placement.Placement,
    shape: tuple[int, int],
    chip: str,
    dtype: str,
) -> tuple[float, str]:
    """Returns how a kernel backend pads hidden units: its FLOPs over those of the exact widths for evenly routed
    tokens, and a text, empty if nothing is padded. Raises ValueError if the backend does not take the job."""
    _, unit = checked_tiles(backend, placement, shape, chip, dtype)
    ratio = hidden_unit_padding.flops_ratio(_all_widths(placement), unit)
    if ratio == 1:
        return ratio, ""
    return ratio, f"hidden units padded to multiples of {unit}: {100 * (ratio - 1):.1f}% more FLOPs"


def run_kernels(backend, x_ND, rows_E, weights, shard, placement, job, interpret=False):
    """Runs the kernels of a backend. The TPU kernels are one differentiable function; GPU kernels run in chunks of
    rows. job: see _tiles."""
    tiles, unit = job
    rows_E, weights, placement = hidden_unit_padding.pad_experts(
        rows_E, weights, shard, placement, unit
    )
    arguments = x_ND, rows_E, *weights, shard
    if backend == "pallas_tpu":
        return pallas_tpu.pallas_tpu(*arguments, placement, tiles, interpret)
    return chunks.run_in_chunks(*arguments, KERNELS[backend], placement, tiles, interpret)


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
    differ by more than bfloat16 explains, or where they cannot be compiled or run."""
    module, widths = KERNELS[backend], placement.widths[0]
    job = tiles, _ = checked_tiles(backend, placement, (0, dim), chip, dtype)
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
        rows = jnp.asarray(rows_E, jnp.int32)
        return run_kernels(backend, x, rows, w, jnp.int32(0), placement, job, interpret)

    def slow(x, w):
        return reference(x, jnp.asarray(rows_E), w, widths)

    def both(function):
        y, pull = jax.vjp(function, x_ND, weights)
        return jax.tree.leaves((y, pull(dy_ND)))

    instead = "set moe.backend=blocked, which runs anywhere, and report it"
    expected = jax.jit(lambda: both(slow))()
    try:
        computed = jax.block_until_ready(jax.jit(lambda: both(kernels))())
    except Exception as error:  # whatever a compiler or driver raises
        reason = (str(error).splitlines() or [""])[0]
        raise RuntimeError(
            f"the kernels of {backend} do not run on this device ({type(error).__name__}: "
            f"{reason[:200]}); {instead}"
        ) from error
    for name, got, want in zip(("y", "dx", *ExpertWeights._fields), computed, expected):
        got, want = (np.asarray(a, np.float32) for a in (got, want))
        norm = np.linalg.norm(want)
        error = np.linalg.norm(got - want) / norm
        if not (
            error < 0.02 and np.abs(got - want).max() < 0.3 * norm / want.size**0.5
        ):  # no tile may be amiss
            raise RuntimeError(
                f"the kernels of {backend} are wrong on this device: {name} differs from the reference "
                f"by {error:.3g} of its norm, {np.abs(got - want).max():.3g} at most; {instead}"
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
        job = checked_tiles(backend, placement, x_ND.shape, chip, str(x_ND.dtype))
        return run_kernels(backend, x_ND, rows_E, weights, shard, placement, job)
    if backend == "reference":
        ways = [functools.partial(reference, widths=widths) for widths in placement.widths]
        return jax.lax.switch(shard, ways, x_ND, rows_E, weights)
    return blocked(x_ND, rows_E, *weights, shard, placement, blocks, chip)
