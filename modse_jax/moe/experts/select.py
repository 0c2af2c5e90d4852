"""The expert FFN over experts of unequal width, and the choice of the backend that computes it.

A backend is an implementation of the expert FFN: plain JAX (`reference`, `blocked`) or Pallas
kernels for one kind of chip (`pallas_tpu`, `pallas_gpu`, `pallas_triton`).

Expert e owns the hidden units offset[e] : offset[e] + width[e] of the flat hidden axis H, the
sum of all widths, so that there is no padding to the widest expert. Its output is SwiGLU without
biases:

    E_e(x) = (silu(x W_gate) * (x W_up)) W_down

Legend: N routed tokens, D model dimension, E experts, H flat hidden axis.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modse_jax.errors import describe_exception
from modse_jax.moe import expert_placement
from modse_jax.moe.experts import chunks, hidden_unit_padding, pallas_gpu, pallas_tpu, pallas_triton
from modse_jax.moe.experts.block_sizes import Blocks
from modse_jax.moe.experts.blocked import blocked
from modse_jax.moe.experts.expert_weights import ExpertWeights
from modse_jax.moe.experts.reference_ffn import reference
from modse_jax.moe.layer_options import BACKENDS
from modse_jax.runtime import choices

KERNELS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu, "pallas_triton": pallas_triton}

# The tiles of all kernels divide a model dimension that is a multiple of this. Others are padded.
MODEL_UNIT = 128

# Kernels pad the widths of experts and the model dimension to full tiles. "auto" chooses `blocked`
# instead if the padding would multiply the FLOPs by more than this.
MAX_PADDING = 1.5

# Bounds of the self-test of kernels: on the norm of the error relative to the norm of the
# reference, and on the largest error of one element relative to the root mean square of the
# reference. The second bound finds a single wrong tile, which hardly changes the norm.
MAX_RELATIVE_ERROR = 0.02
MAX_ELEMENT_ERROR = 0.3

USE_BLOCKED = "set moe.backend=blocked, which runs anywhere, and report it"


class KernelJob(NamedTuple):
    """The tile sizes of a kernel backend, and what it pads to full tiles.

    Attributes:
        tiles: the tile sizes of the backend's module.
        hidden_unit: every expert's width is padded to a multiple of it (hidden_unit_padding.py).
        model_unit: the model dimension is padded to a multiple of it.
    """

    tiles: Any
    hidden_unit: int
    model_unit: int = MODEL_UNIT

    def pad_dim(self, dim: int) -> int:
        """Returns the padded model dimension."""
        return hidden_unit_padding.pad_width(dim, self.model_unit)


def check_backend(
    backend: str,
    placement: expert_placement.Placement,
    shape: tuple[int, int],
    chip: str,
    dtype: str,
) -> None:
    """Checks that a backend supports these experts, shapes, chip and dtype.

    Args:
        backend: a value of moe.backend.
        placement: the widths of the experts of every shard.
        shape: (N, D), the shape of the routed tokens of one device.
        chip: the name of the chip; see sharding.chip_name.
        dtype: the compute dtype.

    Raises:
        ValueError: the backend does not support them. The message names an alternative.
    """
    if backend in KERNELS:
        checked_tiles(backend, placement, shape, chip, dtype)


def checked_tiles(
    backend: str,
    placement: expert_placement.Placement,
    shape: tuple[int, int],
    chip: str,
    dtype: str,
) -> KernelJob:
    """Returns the tile sizes of a kernel backend, and what it pads.

    See check_backend for the arguments.

    Raises:
        ValueError: the backend does not support these experts, shapes, chip or dtype.
    """
    module = KERNELS[backend]
    num_rows, dim = shape
    widths = _all_widths(placement)
    padded_dim = hidden_unit_padding.pad_width(dim, MODEL_UNIT)
    tiles = module.tiles_for(widths, padded_dim, chip, dtype)
    unit = module.unit_for(widths, chip, dtype)
    padded = hidden_unit_padding.pad_placement(placement, unit)
    module.check_tasks(num_rows, padded, tiles)
    return KernelJob(tiles, unit, MODEL_UNIT)


def _all_widths(placement: expert_placement.Placement) -> list[int]:
    return [width for widths in placement.widths for width in widths]


def select_backend(
    backend: str,
    placement: expert_placement.Placement,
    shape: tuple[int, int],
    chip: str,
    dtype: str,
) -> tuple[str, str]:
    """Returns the backend to use ("auto" resolved), and a note for the user.

    See check_backend for the arguments. "auto" follows this rule:

    *   TPUs: pallas_tpu, because `blocked` takes minutes to compile there (LOG.md).
    *   A100, H100, H200, B200 in bfloat16 or float16: pallas_triton. The rule comes from published
        timings of other grouped matmuls on an H100 (tokamax's shipped autotuning results): 650
        TFLOP/s forward and 460 to 595 for weight gradients through Triton, 410 to 480 and 100 to
        119 through Mosaic. Our own kernels have not been timed on hardware. A run checks them on
        its device before it uses them (self_test_kernels).
    *   Otherwise, and if those kernels do not support the shapes, or need more than MAX_PADDING
        times the FLOPs because they pad widths to full tiles: blocked.

    The note says why "auto" chose `blocked` on a chip for which there are kernels, or how many more
    FLOPs the chosen kernels need because of padding. Otherwise it is empty.
    """
    choices.check(BACKENDS, "backend", backend)
    selected = _kernels_for_chip(chip) if backend == "auto" else backend
    if selected not in KERNELS:
        return selected, ""
    try:
        ratio, note = padding(selected, placement, shape, chip, dtype)
    except ValueError as error:
        if backend == "auto":
            return "blocked", str(error)
        return selected, ""  # check_backend reports the error
    if backend == "auto" and ratio > MAX_PADDING:
        return "blocked", f"{selected} would need {ratio:.1f} times the FLOPs: {note}"
    return selected, note


def _kernels_for_chip(chip: str) -> str:
    """Returns the backend that "auto" tries first on a chip."""
    if chip in pallas_tpu.TILINGS:
        return "pallas_tpu"
    if chip in pallas_triton.CHIPS:
        return "pallas_triton"
    return "blocked"


def padding(
    backend: str,
    placement: expert_placement.Placement,
    shape: tuple[int, int],
    chip: str,
    dtype: str,
) -> tuple[float, str]:
    """Returns how much a kernel backend pads its matmuls, as a number and as text.

    The number is the FLOPs with padding divided by those of the exact widths, for evenly routed
    tokens. The text is empty if nothing is padded. See check_backend for the arguments.

    Raises:
        ValueError: the backend does not support these experts, shapes, chip or dtype.
    """
    job = checked_tiles(backend, placement, shape, chip, dtype)
    dim = shape[1]
    padded_dim = job.pad_dim(dim)
    width_ratio = hidden_unit_padding.flops_ratio(_all_widths(placement), job.hidden_unit)
    parts = []
    if width_ratio > 1:
        parts.append(f"hidden units padded to multiples of {job.hidden_unit}")
    if padded_dim > dim:
        parts.append(f"model.dim={dim} padded to {padded_dim}")
    if not parts:
        return 1.0, ""
    ratio = width_ratio * padded_dim / dim
    return ratio, f"{' and '.join(parts)}: {100 * (ratio - 1):.1f}% more FLOPs"


def run_kernels(
    backend: str,
    x_ND: jax.Array,
    rows_E: jax.Array,
    weights: ExpertWeights,
    shard: jax.Array,
    placement: expert_placement.Placement,
    job: KernelJob,
    interpret: Any = False,
) -> jax.Array:
    """Computes the expert FFN with the Pallas kernels of a backend; returns y_ND.

    See expert_ffn for the other arguments. GPU kernels run in chunks of rows (chunks.py); the TPU
    kernels take all rows at once.

    Args:
        job: the result of checked_tiles.
        interpret: runs the kernels in Pallas's interpreter, on any device.
    """
    dim = x_ND.shape[1]
    padded_dim = job.pad_dim(dim)
    if padded_dim > dim:
        x_ND, weights = _pad_model_dimension(x_ND, weights, padded_dim)
        y_ND = run_kernels(backend, x_ND, rows_E, weights, shard, placement, job, interpret)
        return y_ND[:, :dim]
    rows_E, weights, placement = hidden_unit_padding.pad_experts(
        rows_E, weights, shard, placement, job.hidden_unit
    )
    arguments = (x_ND, rows_E, *weights, shard)
    if backend == "pallas_tpu":
        return pallas_tpu.pallas_tpu(*arguments, placement, job.tiles, interpret)
    return chunks.run_in_chunks(*arguments, KERNELS[backend], placement, job.tiles, interpret)


def _pad_model_dimension(
    x_ND: jax.Array, weights: ExpertWeights, dim: int
) -> tuple[jax.Array, ExpertWeights]:
    """Pads the model dimension of the rows and of the weights with zeros, in copies.

    The zeros add exactly 0 to the hidden units, and so to the output and to all gradients.
    """
    w_gate, w_up, w_down = weights
    added = dim - x_ND.shape[1]
    first_axis = ((0, added), (0, 0))
    last_axis = ((0, 0), (0, added))
    padded = ExpertWeights(
        jnp.pad(w_gate, first_axis), jnp.pad(w_up, first_axis), jnp.pad(w_down, last_axis)
    )
    return jnp.pad(x_ND, last_axis), padded


def self_test_kernels(
    backend: str,
    placement: expert_placement.Placement,
    dim: int,
    chip: str,
    dtype: str,
    interpret: Any = False,
) -> None:
    """Runs a backend's kernels on this device and compares them with the plain reference.

    Outputs and gradients are compared, for random inputs with padding rows, an expert with many
    rows and an expert without rows. See check_backend for the arguments.

    Raises:
        RuntimeError: the kernels cannot be compiled or run, or the results differ by more than
            bfloat16 explains.
    """
    widths = placement.widths[0]
    job = checked_tiles(backend, placement, (0, dim), chip, dtype)
    rows_E = _self_test_rows(backend, placement, job.tiles)
    x_ND, dy_ND, weights = _self_test_inputs(rows_E, widths, dim, dtype)

    def run_backend(x_ND: jax.Array, weights: ExpertWeights) -> jax.Array:
        rows = jnp.asarray(rows_E, jnp.int32)
        return run_kernels(backend, x_ND, rows, weights, jnp.int32(0), placement, job, interpret)

    def run_reference(x_ND: jax.Array, weights: ExpertWeights) -> jax.Array:
        return reference(x_ND, jnp.asarray(rows_E), weights, widths)

    def output_and_gradients(function: Callable) -> list[jax.Array]:
        y_ND, pull_back = jax.vjp(function, x_ND, weights)
        return jax.tree.leaves((y_ND, pull_back(dy_ND)))

    expected = jax.jit(lambda: output_and_gradients(run_reference))()
    try:
        computed = jax.jit(lambda: output_and_gradients(run_backend))()
        computed = jax.block_until_ready(computed)
    except Exception as error:  # whatever a compiler or driver raises
        reason = describe_exception(error).splitlines()[0]
        raise RuntimeError(
            f"the kernels of {backend} do not run on this device ({type(error).__name__}: "
            f"{reason[:200]}); {USE_BLOCKED}"
        ) from error
    for name, got, want in zip(("y", "dx", *ExpertWeights._fields), computed, expected):
        _compare(backend, name, got, want)


def _self_test_rows(backend: str, placement: expert_placement.Placement, tiles: Any) -> np.ndarray:
    """Returns the number of rows of every expert of a self-test, padded to placement.slots.

    They cover the edge cases: an expert without rows, one with a few rows, one with many rows that
    start in the middle of a row tile, one with exactly as many rows as a tile, and the other
    experts with a few rows. With fewer than 3 experts, the first cases are left out.
    """
    num_experts = len(placement.widths[0])
    many = KERNELS[backend].check_rows(tiles)
    rows = [0, 7, many, tiles.rows, *range(1, num_experts)]
    rows = rows[max(0, 3 - num_experts) :][:num_experts]
    rows_E = np.zeros(placement.slots, np.int64)
    rows_E[:num_experts] = rows
    return rows_E


def _self_test_inputs(
    rows_E: np.ndarray, widths: tuple[int, ...], dim: int, dtype: str
) -> tuple[jax.Array, jax.Array, ExpertWeights]:
    """Returns random (x_ND, dy_ND, weights).

    Padding rows of x_ND are NaN, so that a kernel that lets them reach a result fails the test.
    """
    num_rows = -(-int(rows_E.sum()) // 8) * 8 + 8
    num_hidden = sum(widths)
    keys = jax.random.split(jax.random.key(0), 5)
    x_ND = jax.random.normal(keys[0], (num_rows, dim), dtype)
    dy_ND = jax.random.normal(keys[1], (num_rows, dim), dtype)
    is_padding_N1 = jnp.arange(num_rows)[:, None] >= rows_E.sum()
    x_ND = jnp.where(is_padding_N1, jnp.nan, x_ND)
    weights = ExpertWeights(
        w_gate=0.05 * jax.random.normal(keys[2], (dim, num_hidden), dtype),
        w_up=0.05 * jax.random.normal(keys[3], (dim, num_hidden), dtype),
        w_down=0.05 * jax.random.normal(keys[4], (num_hidden, dim), dtype),
    )
    return x_ND, dy_ND, weights


def _compare(backend: str, name: str, computed: jax.Array, expected: jax.Array) -> None:
    """Raises RuntimeError if an array differs from the reference, or is NaN."""
    got = np.asarray(computed, np.float32)
    want = np.asarray(expected, np.float32)
    norm = np.linalg.norm(want)
    error = np.linalg.norm(got - want) / norm
    largest = np.abs(got - want).max()
    # Written as "is within the bounds", because every comparison with NaN is False: NaN fails.
    is_equal = error < MAX_RELATIVE_ERROR and largest < MAX_ELEMENT_ERROR * norm / want.size**0.5
    if not is_equal:
        raise RuntimeError(
            f"the kernels of {backend} are wrong on this device: {name} differs from the reference "
            f"by {error:.3g} of its norm, {largest:.3g} at most; {USE_BLOCKED}"
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
    """Returns y_ND, the output of every row's own expert.

    A row is one routed token: a token with one of the experts that it chose.

    Args:
        x_ND: rows sorted by expert.
        rows_E: int32, the number of rows of each expert of `shard`, in the placement's order. A
            shard with fewer experts than placement.slots (the most of any shard) has zeros at the
            end. Rows past the sum are padding rows: they may hold anything, NaN included, and their
            outputs and gradients are 0.
        weights: the weights of the experts of `shard`, in float32 or the dtype of x_ND. The matmuls
            run in the dtype of x_ND and accumulate in float32.
        placement: static, the experts of all shards. Without expert parallelism it is
            place_experts(widths, 1, "whole").
        backend: a value of moe.backend; see select_backend for "auto".
        blocks: block sizes of the `blocked` backend.
        chip: the name of the chip; see sharding.chip_name.
        shard: the shard that this device holds; may be traced.

    Raises:
        ValueError: the widths do not sum to the flat hidden axis, or the backend does not support
            the shapes, the dtype or the chip.
    """
    num_hidden = weights.w_gate.shape[1]
    fits_weights = all(sum(widths) == num_hidden for widths in placement.widths)
    if not fits_weights or placement.slots != rows_E.shape[0]:
        raise ValueError(
            f"widths {placement.widths} do not fit weights {weights.w_gate.shape} and rows "
            f"{rows_E.shape}"
        )
    weights = ExpertWeights(*(w.astype(x_ND.dtype) for w in weights))
    shard = jnp.asarray(shard, jnp.int32)
    dtype = str(x_ND.dtype)
    backend, _ = select_backend(backend, placement, x_ND.shape, chip, dtype)
    if backend in KERNELS:
        job = checked_tiles(backend, placement, x_ND.shape, chip, dtype)
        return run_kernels(backend, x_ND, rows_E, weights, shard, placement, job)
    if backend == "reference":
        branches = [functools.partial(reference, widths=widths) for widths in placement.widths]
        return jax.lax.switch(shard, branches, x_ND, rows_E, weights)
    return blocked(x_ND, rows_E, *weights, shard, placement, blocks, chip)
