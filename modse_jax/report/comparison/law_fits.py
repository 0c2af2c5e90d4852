"""Fits scaling laws to the shapes of a sweep, where there are enough of them, else says why not."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from modse_jax.model import accounting
from modse_jax.report.comparison.comparisons import ComparedShape
from modse_jax.report.comparison.shapes import Shape
from modse_jax.study import fits
from modse_jax.study.fits import Fit, Interval, LawToFit
from modse_jax.sweeps import matching

ROWS_PER_COEFFICIENT = 2
FEWEST_VALUES = 3  # of every input
BOOTSTRAP_SAMPLES = 100
BOOTSTRAP_LEVEL = 0.9

Inputs = dict[str, float]


class LawChoice(NamedTuple):
    """A law that a report tries to fit.

    Attributes:
        name: its name, as in laws.py.
        law: the law.
        of_shapes: the shapes that it is about.
        inputs: its inputs for a shape; None if the law is not about it.
    """

    name: str
    law: LawToFit
    of_shapes: str
    inputs: Callable[[Shape], Inputs | None]


class LawFit(NamedTuple):
    """A law and its fit in one view, or the reason why it was not fitted.

    Attributes:
        name: the name of the law.
        reason: why there is no fit; "" if there is one.
        shapes: the shapes that were fitted, or would be.
        fit: the fit.
        intervals: percentile intervals of the coefficients, from a bootstrap over shapes.
        predicted: the losses of the fit, by shape.
    """

    name: str
    reason: str
    shapes: list[ComparedShape]
    fit: Fit | None = None
    intervals: Mapping[str, Interval] = {}
    predicted: Sequence[float] = ()


def _chinchilla_inputs(shape: Shape) -> Inputs | None:
    if not shape.config.is_dense:
        return None
    return {
        "parameters": accounting.count_parameters(shape.config).total,
        "tokens": matching.count_tokens(shape.config),
    }


def _granularity_inputs(shape: Shape) -> Inputs | None:
    if shape.layer is None:
        return None
    counts = accounting.count_parameters(shape.config)
    return {
        "parameters": counts.total - counts.embeddings,
        "tokens": matching.count_tokens(shape.config),
        "granularity": float(shape.layer.krajewski_granularity),
    }


def _joint_inputs(shape: Shape) -> Inputs | None:
    experts = _count_whole_experts(shape)
    if experts is None:
        return None
    return {
        "parameters": accounting.count_active_parameters(shape.config).total,
        "tokens": matching.count_tokens(shape.config),
        "experts": experts,
    }


def _routed_inputs(shape: Shape) -> Inputs | None:
    experts = _count_whole_experts(shape)
    if experts is None:
        return None
    active = accounting.count_active_parameters(shape.config)
    return {"parameters": active.total - active.router, "experts": experts}


def _count_whole_experts(shape: Shape) -> float | None:
    """Returns the number of experts of which a token uses one as wide as the dense FFN.

    It is 1 for a dense model, and None for any other layer.
    """
    layer = shape.layer
    if layer is None:
        return 1.0
    is_whole = layer.active == 1 and layer.granularity == 1 and not layer.shared
    return float(layer.experts) if is_whole else None


def choose_laws() -> list[LawChoice]:
    """Returns the laws that a report tries to fit."""
    return [
        LawChoice(
            "Chinchilla (Hoffmann et al. 2022)",
            fits.ChinchillaToFit(),
            "dense shapes",
            _chinchilla_inputs,
        ),
        LawChoice(
            "Granularity (Krajewski et al. 2024)",
            fits.GranularityToFit(),
            "mixtures of the expansion rate that most of them have",
            _granularity_inputs,
        ),
        LawChoice(
            "Joint (Ludziejewski et al. 2025)",
            fits.JointToFit(),
            "dense shapes, and mixtures of which a token uses one expert of the dense width",
            _joint_inputs,
        ),
        LawChoice(
            "Routed (Clark et al. 2022)",
            fits.RoutedToFit(),
            "dense shapes, and mixtures of which a token uses one expert of the dense width",
            _routed_inputs,
        ),
    ]


def fit_law(choice: LawChoice, shapes: Sequence[ComparedShape], view: str) -> LawFit:
    """Fits a law to the mean losses of shapes in a view, if they determine it.

    There must be at least two shapes for a coefficient, and three values of every input.

    Args:
        choice: the law.
        shapes: the shapes of all groups.
        view: the view whose losses are fitted.
    """
    chosen = [c for c in shapes if c.outcomes[view].mean is not None and choice.inputs(c.shape)]
    if isinstance(choice.law, fits.GranularityToFit):
        chosen = _keep_common_expansion(chosen)
    rows = [choice.inputs(compared.shape) or {} for compared in chosen]
    needed = ROWS_PER_COEFFICIENT * len(choice.law.coefficients)
    reasons = []
    if len(rows) < needed:
        reasons.append(
            f"it has {len(choice.law.coefficients)} coefficients and needs {needed} shapes; the "
            f"sweep has {len(rows)} with a loss here ({choice.of_shapes})"
        )
    for name in choice.law.inputs if rows else ():
        count = len({row[name] for row in rows})
        if count < FEWEST_VALUES:
            reasons.append(f"it needs {FEWEST_VALUES} values of {name}; these shapes have {count}")
    if reasons:
        return LawFit(choice.name, "; ".join(reasons), chosen)
    data = {name: np.array([row[name] for row in rows]) for name in choice.law.inputs}
    data["loss"] = np.array([compared.mean_loss(view) for compared in chosen])
    fitted = fits.fit(choice.law, data)
    intervals = fits.bootstrap(choice.law, data, fitted, BOOTSTRAP_SAMPLES, BOOTSTRAP_LEVEL)
    log_loss, _ = choice.law.log_loss(choice.law.encode(fitted.coefficients), data)
    return LawFit(choice.name, "", chosen, fitted, intervals, np.exp(log_loss).tolist())


def _keep_common_expansion(shapes: list[ComparedShape]) -> list[ComparedShape]:
    """Returns the mixtures of the expansion rate that most of them have."""
    rates = [c.shape.layer.expansion_rate for c in shapes if c.shape.layer is not None]
    if not rates:
        return []
    common = max(rates, key=rates.count)
    return [c for c, rate in zip(shapes, rates) if rate == common]
