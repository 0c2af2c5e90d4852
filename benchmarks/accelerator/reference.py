"""The expert layer in float64 numpy, and a search for the parts where another result differs.

Legend: N routed tokens, D model width, H hidden units of all experts, n tokens of one expert,
W hidden units of one expert.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from modse_jax.moe import expert_widths
from modse_jax.moe.experts.expert_weights import ExpertWeights

ARRAYS = ("y", "dx", "dw_gate", "dw_up", "dw_down")

PADDING_ROWS = 13

# Rounding to bfloat16 between the matmuls explains errors up to these limits, as in
# select.self_test_kernels. They are relative to an array's norm, and to the root mean square of its
# elements.
NORM_LIMIT = 0.02
ELEMENT_LIMIT = 0.3


def random_inputs(
    dim: int, widths: Sequence[int], rows: Sequence[int], dtype: str
) -> tuple[jax.Array, ExpertWeights, jax.Array]:
    """Returns tokens, weights and the gradient of the output. Padding rows hold NaN."""
    rng = np.random.default_rng(0)
    hidden, routed = sum(widths), sum(rows)
    total = -(-routed // 8) * 8 + PADDING_ROWS

    def draw(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape, np.float32), dtype)

    scale = dim**-0.5
    weights = ExpertWeights(
        draw(dim, hidden, scale=scale),
        draw(dim, hidden, scale=scale),
        draw(hidden, dim, scale=scale),
    )
    x_ND, dy_ND = (draw(total, dim).at[routed:].set(jnp.nan) for _ in range(2))
    return x_ND, weights, dy_ND


def run_layer(
    x_ND: np.ndarray,
    weights: ExpertWeights,
    dy_ND: np.ndarray,
    widths: Sequence[int],
    rows: Sequence[int],
) -> dict[str, np.ndarray]:
    """Returns the output and all gradients (ARRAYS) in float64. Padding rows of both are 0."""
    w_gate, w_up, w_down = (np.asarray(w, np.float64) for w in weights)
    x_ND, dy_ND = (np.asarray(a, np.float64) for a in (x_ND, dy_ND))
    out = {
        "y": np.zeros_like(x_ND),
        "dx": np.zeros_like(x_ND),
        "dw_gate": np.zeros_like(w_gate),
        "dw_up": np.zeros_like(w_up),
        "dw_down": np.zeros_like(w_down),
    }
    for token, unit in _slices(widths, rows):
        x_nD, dy_nD = x_ND[token], dy_ND[token]
        gate_nW, up_nW = x_nD @ w_gate[:, unit], x_nD @ w_up[:, unit]
        sigmoid_nW = 1 / (1 + np.exp(-gate_nW))
        silu_nW = gate_nW * sigmoid_nW
        hidden_nW = silu_nW * up_nW
        dhidden_nW = dy_nD @ w_down[unit].T
        dup_nW = dhidden_nW * silu_nW
        dgate_nW = dhidden_nW * up_nW * sigmoid_nW * (1 + gate_nW * (1 - sigmoid_nW))
        out["y"][token] = hidden_nW @ w_down[unit]
        out["dx"][token] = dgate_nW @ w_gate[:, unit].T + dup_nW @ w_up[:, unit].T
        out["dw_gate"][:, unit] = x_nD.T @ dgate_nW
        out["dw_up"][:, unit] = x_nD.T @ dup_nW
        out["dw_down"][unit] = hidden_nW.T @ dy_nD
    return out


def _slices(widths: Sequence[int], rows: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yields every expert's tokens and hidden units."""
    for first_token, n, first_unit, width in zip(
        expert_widths.offsets(rows), rows, expert_widths.offsets(widths), widths
    ):
        yield slice(first_token, first_token + n), slice(first_unit, first_unit + width)


def relative_errors(
    got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]
) -> dict[str, float | None]:
    """Returns the norm of the difference over the norm, by array; None if it is not finite."""
    errors = {}
    for name, want in wanted.items():
        difference = np.linalg.norm(np.asarray(got[name], np.float64) - want)
        error = difference / max(np.linalg.norm(want), 1e-300)
        errors[name] = float(f"{error:.3g}") if np.isfinite(error) else None
    return errors


def find_faults(
    got: dict[str, np.ndarray],
    wanted: dict[str, np.ndarray],
    widths: Sequence[int],
    rows: Sequence[int],
) -> list[dict]:
    """Returns the parts of the arrays that are wrong: array, expert, and position in its part.

    Rows and columns are counted from the first of the expert's part of the array; of weight
    gradients one of the two axes is the hidden units. The expert of padding rows is "padding".
    """
    routed = sum(rows)
    faults = []
    for name, want in wanted.items():
        have = np.asarray(got[name], np.float64)
        rms = np.sqrt(np.mean(want**2))
        parts = []
        for expert, (token, unit) in enumerate(_slices(widths, rows)):
            index = {"dw_gate": np.s_[:, unit], "dw_up": np.s_[:, unit], "dw_down": np.s_[unit]}
            parts.append((expert, index.get(name, np.s_[token])))
        if name in ("y", "dx"):
            parts.append(("padding", np.s_[routed:]))
        for expert, part in parts:
            fault = _compare(have[part], want[part], rms)
            if fault:
                faults.append({"array": name, "expert": expert, **fault})
    return faults


def _compare(have: np.ndarray, want: np.ndarray, rms: float) -> dict | None:
    if have.size == 0:
        return None
    difference = np.abs(have - want)
    difference[~np.isfinite(difference)] = np.inf
    norm = np.linalg.norm(want)
    finite = np.isfinite(difference).all()
    error = np.linalg.norm(difference) if finite else np.inf
    if error <= NORM_LIMIT * norm and difference.max() < ELEMENT_LIMIT * rms:
        return None
    bad = difference >= ELEMENT_LIMIT * rms
    if not bad.any():  # small errors everywhere
        bad = np.ones_like(bad)
    return {
        "error_over_norm": float(f"{error / norm:.3g}") if finite and norm else None,
        "largest_error": float(f"{difference.max():.3g}") if finite else None,
        "not_finite": int(np.isinf(difference).sum()),
        "rows": list_ranges(np.flatnonzero(bad.any(axis=1))),
        "columns": list_ranges(np.flatnonzero(bad.any(axis=0))),
    }


def list_ranges(numbers: Sequence[int], most: int = 8) -> str:
    """Returns sorted numbers as "0-63, 128"; after `most` ranges "and N more"."""
    ranges: list[list[int]] = []
    for number in map(int, numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    text = [str(a) if a == b else f"{a}-{b}" for a, b in ranges[:most]]
    if len(ranges) > most:
        text.append(f"and {len(ranges) - most} more")
    return ", ".join(text)
