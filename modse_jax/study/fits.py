"""Fits scaling laws to the losses of runs, and says how far the result can be trusted.

A fit minimizes the sum over runs of a Huber loss of log(predicted loss) - log(measured loss), as
Hoffmann et al. 2022 do, from every point of a grid of starts. The gradients are analytic. A fit
reports all of its starts, the coefficients that stopped at a bound or never left a start value, and
intervals from a bootstrap over runs. Nothing is dropped: a row that is not finite is refused.

The laws and their symbols are those of laws.py. Every law is log(sum over terms of exp(term)), and
each term is linear in most coefficients.

Legend: R runs (rows), P coefficients, M terms of a law.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize

from modse_jax.errors import UserError

Data = Mapping[str, np.ndarray]  # "loss" in nats and the inputs of the law, each [R]

LEAST_SQUARES = math.inf  # a Huber threshold: every residual is squared
# Every start is followed until the objective changes by less than COARSE, relatively. The best
# NUM_REFINED starts are then followed until it changes by less than FINE.
COARSE = 1e-7
FINE = 1e-14
NUM_REFINED = 16

NEAR = 1e-6  # a coefficient this close to a bound or a start value, relatively, is reported


class Coefficient(NamedTuple):
    """A coefficient as the optimizer sees it.

    Attributes:
        name: its name in the law; a name that begins with "log " is fitted as its logarithm.
        starts: the values that starts take, before any logarithm.
        low, high: bounds, before any logarithm.
    """

    name: str
    starts: tuple[float, ...]
    low: float
    high: float

    @property
    def is_log(self) -> bool:
        """True if the optimizer varies the logarithm of the coefficient."""
        return self.name.startswith("log ")

    def encode(self, value: float) -> float:
        """Returns the number that the optimizer varies: the coefficient, or its logarithm."""
        return math.log(value) if self.is_log else value

    def decode(self, encoded: float) -> float:
        """Returns the coefficient that belongs to a number of the optimizer."""
        return math.exp(encoded) if self.is_log else float(encoded)


class Terms(NamedTuple):
    """The logarithms of the terms of a law, and their derivatives."""

    log_terms_RM: np.ndarray
    gradients_RMP: np.ndarray


@dataclasses.dataclass(frozen=True)
class LawToFit:
    """A law whose coefficients can be fitted. Subclasses give its terms.

    Attributes:
        coefficients: the coefficients, in the order of the optimizer's vector.
        inputs: names of the columns that the law takes besides "loss".
        huber: residuals of log loss above this are taken linearly.
    """

    coefficients: tuple[Coefficient, ...]
    inputs: tuple[str, ...]
    huber: float

    def terms(self, encoded_P: np.ndarray, data: Data) -> Terms:
        """Returns the terms of the law for every run."""
        raise NotImplementedError

    def log_loss(self, encoded_P: np.ndarray, data: Data) -> tuple[np.ndarray, np.ndarray]:
        """Returns (log of the predicted loss [R], its derivatives [R, P])."""
        terms = self.terms(encoded_P, data)
        # scipy.special.logsumexp computes the same; its checks would take most of the time.
        largest_R1 = terms.log_terms_RM.max(axis=1, keepdims=True)
        share_RM = np.exp(terms.log_terms_RM - largest_R1)
        sum_R1 = share_RM.sum(axis=1, keepdims=True)
        log_loss_R = (largest_R1 + np.log(sum_R1))[:, 0]
        share_RM /= sum_R1
        return log_loss_R, np.matmul(share_RM[:, None], terms.gradients_RMP)[:, 0]

    def objective(self, encoded_P: np.ndarray, data: Data) -> tuple[float, np.ndarray]:
        """Returns the sum of Huber losses over runs, and its gradient."""
        log_loss_R, gradients_RP = self.log_loss(encoded_P, data)
        residual_R = log_loss_R - np.log(data["loss"])
        clipped_R = np.clip(residual_R, -self.huber, self.huber)
        # A Huber loss is c (r - c / 2) for the clipped residual c: r^2 / 2 inside, linear outside.
        value = float(np.sum(clipped_R * (residual_R - clipped_R / 2)))
        return value, clipped_R @ gradients_RP

    def encode(self, values: Mapping[str, float]) -> np.ndarray:
        """Returns the optimizer's vector for coefficients by name."""
        return np.array([c.encode(values[_plain(c.name)]) for c in self.coefficients])

    def decode(self, encoded_P: np.ndarray) -> dict[str, float]:
        """Returns coefficients by name for an optimizer's vector."""
        return {_plain(c.name): c.decode(v) for c, v in zip(self.coefficients, encoded_P)}


def _plain(name: str) -> str:
    return name.removeprefix("log ")


class ChinchillaToFit(LawToFit):
    """L = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022), 1,728 starts."""

    def __init__(self) -> None:
        """Uses the Huber threshold of Besiroglu et al. 2024, and a grid of starts like theirs."""
        exponents = (0.25, 0.5, 1.0, 1.5)
        super().__init__(
            coefficients=(
                Coefficient("log A", _exp(0.1, 5, 10, 15, 20, 25), 1e-6, 1e30),
                Coefficient("log B", _exp(0.1, 5, 10, 15, 20, 25), 1e-6, 1e30),
                Coefficient("log E", _exp(-1, 0, 1), 1e-6, 1e3),
                Coefficient("alpha", exponents, 0.0, 3.0),
                Coefficient("beta", exponents, 0.0, 3.0),
            ),
            inputs=("parameters", "tokens"),
            huber=1e-3,
        )

    def terms(self, encoded_P: np.ndarray, data: Data) -> Terms:
        """Returns log(A / N^alpha), log(B / D^beta) and log E."""
        log_a, log_b, log_e, alpha, beta = encoded_P
        log_n = np.log(data["parameters"])
        log_d = np.log(data["tokens"])
        one = np.ones_like(log_n)
        columns = [
            (log_a - alpha * log_n, {0: one, 3: -log_n}),
            (log_b - beta * log_d, {1: one, 4: -log_d}),
            (log_e * one, {2: one}),
        ]
        return _stack(columns, len(encoded_P))


class GranularityToFit(LawToFit):
    """L = c + (g / G^gamma + a) / N^alpha + b / D^beta (Krajewski et al. 2024)."""

    def __init__(self) -> None:
        """Uses starts around the published coefficients."""
        super().__init__(
            coefficients=(
                Coefficient("log a", (5.0, 50.0), 1e-6, 1e9),
                Coefficient("alpha", (0.1, 0.3), 0.0, 2.0),
                Coefficient("log b", (10.0, 100.0), 1e-6, 1e9),
                Coefficient("beta", (0.1, 0.3), 0.0, 2.0),
                Coefficient("log g", (0.5, 5.0), 1e-9, 1e9),
                Coefficient("gamma", (0.3, 1.0), 0.0, 5.0),
                Coefficient("log c", (0.3, 1.5), 1e-9, 1e3),
            ),
            inputs=("parameters", "tokens", "granularity"),
            huber=0.1,
        )

    def terms(self, encoded_P: np.ndarray, data: Data) -> Terms:
        """Returns the logarithms of the four terms."""
        log_a, alpha, log_b, beta, log_g, gamma, log_c = encoded_P
        log_n = np.log(data["parameters"])
        log_d = np.log(data["tokens"])
        log_granularity = np.log(data["granularity"])
        one = np.ones_like(log_n)
        columns = [
            (log_a - alpha * log_n, {0: one, 1: -log_n}),
            (log_b - beta * log_d, {2: one, 3: -log_d}),
            (
                log_g - gamma * log_granularity - alpha * log_n,
                {4: one, 5: -log_granularity, 1: -log_n},
            ),
            (log_c * one, {6: one}),
        ]
        return _stack(columns, len(encoded_P))


class JointToFit(LawToFit):
    """Fits laws.JointLaw, the loss by active parameters, tokens and experts."""

    def __init__(self) -> None:
        """Uses starts around the published coefficients."""
        super().__init__(
            coefficients=(
                Coefficient("log a", (10.0, 100.0), 1e-3, 1e9),
                Coefficient("alpha", (-0.2,), -2.0, 0.0),
                Coefficient("delta", (-0.2,), -5.0, 5.0),
                Coefficient("gamma", (0.0,), -1.0, 1.0),
                Coefficient("log b", (10.0, 100.0), 1e-3, 1e9),
                Coefficient("beta", (-0.2,), -2.0, 0.0),
                Coefficient("omega", (0.0, 0.5), -5.0, 5.0),
                Coefficient("zeta", (0.0,), -1.0, 1.0),
                Coefficient("log start", (2.0,), 1.0, 40.0),
                Coefficient("log end", (150.0, 600.0), 50.0, 1e5),
                Coefficient("log c", (0.7, 1.5), 1e-6, 1e3),
            ),
            inputs=("parameters", "tokens", "experts"),
            huber=0.01,
        )

    def terms(self, encoded_P: np.ndarray, data: Data) -> Terms:
        """Returns the logarithms of the three terms."""
        log_a, alpha, delta, gamma, log_b, beta, omega, zeta, log_start, log_end, log_c = encoded_P
        log_n = np.log(data["parameters"])
        log_d = np.log(data["tokens"])
        log_e, by_start, by_end = _log_saturating(data["experts"], log_start, log_end)
        one = np.ones_like(log_n)
        slope_n = delta + gamma * log_n
        slope_d = omega + zeta * log_d
        columns = [
            (
                log_a + slope_n * log_e + alpha * log_n,
                {
                    0: one,
                    1: log_n,
                    2: log_e,
                    3: log_e * log_n,
                    8: slope_n * by_start,
                    9: slope_n * by_end,
                },
            ),
            (
                log_b + slope_d * log_e + beta * log_d,
                {
                    4: one,
                    5: log_d,
                    6: log_e,
                    7: log_e * log_d,
                    8: slope_d * by_start,
                    9: slope_d * by_end,
                },
            ),
            (log_c * one, {10: one}),
        ]
        return _stack(columns, len(encoded_P))


class RoutedToFit(LawToFit):
    """log10 L = a log10 N + b log10 E + c log10 N log10 E + d (Clark et al. 2022).

    It is fitted by least squares, as in the paper.
    """

    def __init__(self) -> None:
        """Uses starts around the published coefficients."""
        super().__init__(
            coefficients=(
                Coefficient("a", (-0.05, -0.1), -1.0, 0.0),
                Coefficient("b", (-0.05, -0.2), -2.0, 2.0),
                Coefficient("c", (0.0, 0.02), -1.0, 1.0),
                Coefficient("d", (0.8, 1.5), -5.0, 5.0),
                Coefficient("log start", (1.5, 4.0), 1.0001, 40.0),
                Coefficient("log end", (100.0, 500.0), 50.0, 1e5),
            ),
            inputs=("parameters", "experts"),
            huber=LEAST_SQUARES,
        )

    def terms(self, encoded_P: np.ndarray, data: Data) -> Terms:
        """Returns the only term, the logarithm of the loss."""
        a, b, c, d, log_start, log_end = encoded_P
        ten = math.log(10)
        log_n = np.log10(data["parameters"])
        natural, by_start, by_end = _log_saturating(data["experts"], log_start, log_end)
        log_e = natural / ten
        slope = b + c * log_n
        term = ten * (a * log_n + slope * log_e + d)
        gradients = {
            0: ten * log_n,
            1: ten * log_e,
            2: ten * log_n * log_e,
            3: np.full_like(log_n, ten),
            4: slope * by_start,
            5: slope * by_end,
        }
        return _stack([(term, gradients)], len(encoded_P))


def _exp(*logarithms: float) -> tuple[float, ...]:
    return tuple(math.exp(value) for value in logarithms)


def _stack(columns: Sequence[tuple[np.ndarray, dict[int, np.ndarray]]], count: int) -> Terms:
    """Returns Terms from a term and its nonzero derivatives, by coefficient, per column."""
    log_terms_RM = np.stack([term for term, _ in columns], axis=1)
    gradients_RMP = np.zeros((*log_terms_RM.shape, count))
    for column, (_, gradients) in enumerate(columns):
        for coefficient, gradient in gradients.items():
            gradients_RMP[:, column, coefficient] = gradient
    return Terms(log_terms_RM, gradients_RMP)


def _log_saturating(
    experts: np.ndarray, log_start: float, log_end: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns log of the saturating number of experts, and its derivatives.

    The derivatives are by the logarithms of E_start and E_max; see laws.saturating_experts.
    """
    start = math.exp(log_start)
    end = math.exp(log_end)
    offset = 1 / (1 / start - 1 / end)
    shifted = experts - 1 + offset
    saturating = 1 / (1 / shifted + 1 / end)
    by_shifted = saturating / shifted**2  # derivative of the logarithm
    by_start = by_shifted * offset**2 / start
    by_end = saturating / end - by_shifted * offset**2 / end
    return np.log(saturating), by_start, by_end


class Start(NamedTuple):
    """The end of one start of a fit."""

    objective: float
    coefficients: dict[str, float]
    converged: bool


class Fit(NamedTuple):
    """A fitted law.

    Attributes:
        coefficients: those of the best start.
        objective: the sum of Huber losses.
        rmse: root mean square of log(predicted / measured loss).
        starts: the ends of all starts, best first.
        warnings: sentences about coefficients at a bound or a start value, and about starts.
        num_runs: the number of runs that were fitted.
    """

    coefficients: dict[str, float]
    objective: float
    rmse: float
    starts: list[Start]
    warnings: list[str]
    num_runs: int


def fit(law: LawToFit, data: Data) -> Fit:
    """Fits a law from every combination of the starts of its coefficients.

    Raises:
        UserError: a column is missing or of another length, or a row is not finite and positive.
    """
    columns = check_data(law, data)
    grid = itertools.product(*(c.starts for c in law.coefficients))
    ends = [_minimize(law, columns, _encode(law, start), COARSE) for start in grid]
    ends.sort(key=lambda end: end.fun)
    refined = [_minimize(law, columns, end.x) for end in ends[:NUM_REFINED]]
    return _summarize(law, columns, [*refined, *ends[NUM_REFINED:]])


def _encode(law: LawToFit, values: Sequence[float]) -> np.ndarray:
    return np.array([c.encode(v) for c, v in zip(law.coefficients, values)])


def _minimize(
    law: LawToFit, data: Data, start_P: np.ndarray, tolerance: float = FINE
) -> scipy.optimize.OptimizeResult:
    bounds = [(c.encode(c.low), c.encode(c.high)) for c in law.coefficients]
    return scipy.optimize.minimize(
        law.objective,
        start_P,
        args=(data,),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 5000, "maxfun": 20000, "ftol": tolerance, "gtol": 1e-10, "maxcor": 30},
    )


def _summarize(law: LawToFit, data: Data, ends: Sequence[scipy.optimize.OptimizeResult]) -> Fit:
    ends = sorted(ends, key=lambda end: end.fun)
    best_P = ends[0].x
    log_loss_R, _ = law.log_loss(best_P, data)
    residual_R = log_loss_R - np.log(data["loss"])
    starts = [Start(float(e.fun), law.decode(e.x), bool(e.success)) for e in ends]
    return Fit(
        coefficients=law.decode(best_P),
        objective=float(ends[0].fun),
        rmse=float(np.sqrt(np.mean(residual_R**2))),
        starts=starts,
        warnings=_find_warnings(law, best_P, starts),
        num_runs=len(residual_R),
    )


def _find_warnings(law: LawToFit, best_P: np.ndarray, starts: Sequence[Start]) -> list[str]:
    """Returns what a reader must know before trusting the best start."""
    found = []
    for coefficient, encoded in zip(law.coefficients, best_P):
        name = _plain(coefficient.name)
        value = coefficient.decode(encoded)
        for bound in (coefficient.low, coefficient.high):
            if math.isclose(value, bound, rel_tol=NEAR, abs_tol=NEAR * NEAR):
                found.append(f"{name}={value:.6g} is at its bound {bound:g}")
        if len(coefficient.starts) > 1:
            for start in coefficient.starts:
                if math.isclose(value, start, rel_tol=NEAR):
                    found.append(f"{name}={value:.6g} has not left its start value")
    best = starts[0].objective
    agreeing = sum(start.objective <= best * (1 + 1e-3) + 1e-15 for start in starts)
    if len(starts) > 1 and agreeing < 2:
        found.append(f"only 1 of {len(starts)} starts reached the best objective")
    return found


def check_data(law: LawToFit, data: Data) -> dict[str, np.ndarray]:
    """Returns the columns of a law as float64.

    Raises:
        UserError: a column is missing or of another length, or a row is not finite and positive.
            The message names the row, counted from 1.
    """
    names = (*law.inputs, "loss")
    missing = [name for name in names if name not in data]
    if missing:
        raise UserError(f"the runs lack the columns {', '.join(missing)}, which the law needs")
    columns = {name: np.asarray(data[name], np.float64) for name in names}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"the columns of the runs have different lengths: {lengths}")
    if lengths["loss"] < len(law.coefficients):
        raise UserError(
            f"{lengths['loss']} runs cannot determine {len(law.coefficients)} coefficients"
        )
    for name, column in columns.items():
        bad = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
        if len(bad):
            raise UserError(
                f"row {bad[0] + 1}: {name}={column[bad[0]]} must be finite and above 0; correct "
                "it, or leave the row out and say so"
            )
    return columns


class Interval(NamedTuple):
    """A percentile interval."""

    low: float
    high: float


def bootstrap(
    law: LawToFit, data: Data, fitted: Fit, samples: int = 100, level: float = 0.9, seed: int = 0
) -> dict[str, Interval]:
    """Returns a percentile interval of every coefficient, from a bootstrap over runs.

    Each sample is fitted from the coefficients of the fit to all runs.

    Args:
        fitted: the fit to all runs.
        samples: number of samples, each as many runs as there are, drawn with replacement.
        level: probability inside the interval.
        seed: seed of the draws.
    """
    columns = check_data(law, data)
    rng = np.random.default_rng(seed)
    start_P = law.encode(fitted.coefficients)
    found = []
    for _ in range(samples):
        rows = rng.integers(0, fitted.num_runs, fitted.num_runs)
        sample = {name: column[rows] for name, column in columns.items()}
        found.append(law.decode(_minimize(law, sample, start_P).x))
    tails = [100 * (1 - level) / 2, 100 * (1 + level) / 2]
    return {
        name: Interval(*map(float, np.percentile([f[name] for f in found], tails)))
        for name in fitted.coefficients
    }


class HeldOut(NamedTuple):
    """A fit without the largest runs, and its error on them."""

    fit: Fit
    rmse: float  # of log(predicted / measured loss) on the runs that were left out
    rows: list[int]  # the rows that were left out, from 0


def fit_without_largest(law: LawToFit, data: Data, size: np.ndarray, share: float = 0.1) -> HeldOut:
    """Fits a law to all but the largest runs, and predicts those.

    Args:
        size: what "largest" means, for every run; for example FLOPs.
        share: the share of runs that are left out, at least one.
    """
    columns = check_data(law, data)
    count = max(1, round(share * len(columns["loss"])))
    order = np.argsort(size, kind="stable")
    kept, left_out = order[:-count], order[-count:]
    fitted = fit(law, {name: column[kept] for name, column in columns.items()})
    rest = {name: column[left_out] for name, column in columns.items()}
    log_loss_R, _ = law.log_loss(law.encode(fitted.coefficients), rest)
    error = np.sqrt(np.mean((log_loss_R - np.log(rest["loss"])) ** 2))
    return HeldOut(fitted, float(error), sorted(left_out.tolist()))
