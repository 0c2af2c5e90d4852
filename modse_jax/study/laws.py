"""Published scaling laws of dense and mixture-of-experts models, with their published coefficients.

A law is a frozen dataclass of coefficients. Its methods take plain numbers or NumPy arrays, compute
in float64, and warn if an input lies outside the range that the law was fitted on. The symbols
differ between the papers, so every method says what its arguments count.

Logarithms are natural unless a docstring says otherwise.

Legend: N parameters, D training tokens, E expansion rate or number of experts, G granularity,
C compute in FLOPs.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Value = Any  # a float or a float64 array


class RangeWarning(UserWarning):
    """An input of a law lies outside the range of the runs that the law was fitted on."""


def _warn_outside(law: str, **inputs: tuple[Value, float, float]) -> None:
    """Warns about every input that lies outside its range.

    Args:
        law: the name of the law.
        inputs: name -> (value, smallest fitted value, largest fitted value).
    """
    for name, (value, low, high) in inputs.items():
        if np.any(np.asarray(value) < low) or np.any(np.asarray(value) > high):
            warnings.warn(
                f"{law}: {name}={value} is outside {low:g} to {high:g}, the range of the runs "
                "behind the law; its value is an extrapolation",
                RangeWarning,
                stacklevel=3,
            )


def saturating_experts(experts: Value, start: float, end: float) -> Value:
    """Returns the saturating number of experts, written E with a hat in the papers.

    1 / E_hat = 1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max.

    Source: Clark et al. 2022 (Unified Scaling Laws for Routed Language Models), Eq. 6.

    Args:
        experts: E, the number of experts; 1 for a dense model.
        start: E_start, the value for a dense model.
        end: E_max, the limit for many experts.
    """
    shifted = np.asarray(experts, np.float64) - 1 + 1 / (1 / start - 1 / end)
    return 1 / (1 / shifted + 1 / end)


@dataclasses.dataclass(frozen=True)
class GranularityLaw:
    """Krajewski et al. 2024 (Scaling Laws for Fine-Grained Mixture of Experts): loss in nats.

    L(N, D, G) = c + (g / G^gamma + a) / N^alpha + b / D^beta. The default coefficients are those
    of MoE models with an expansion rate of 64.
    """

    a: float = 18.1
    alpha: float = 0.115
    b: float = 30.8
    beta: float = 0.147
    g: float = 2.1
    gamma: float = 0.58
    c: float = 0.47

    def loss(self, parameters: Value, tokens: Value, granularity: Value = 1.0) -> Value:
        """Returns the loss.

        Args:
            parameters: all parameters without embeddings, N.
            tokens: training tokens, D.
            granularity: width of the dense FFN over that of an expert, G.
        """
        _warn_outside(
            "granularity law",
            parameters=(parameters, 1.29e8, 3.7e9),
            tokens=(tokens, 1.6e10, 1.3e11),
            granularity=(granularity, 1, 16),
        )
        return self.evaluate(parameters, tokens, granularity)

    def evaluate(self, parameters: Value, tokens: Value, granularity: Value = 1.0) -> Value:
        """Returns the loss as `loss` does, without warnings."""
        N = np.asarray(parameters, np.float64)
        D = np.asarray(tokens, np.float64)
        G = np.asarray(granularity, np.float64)
        return self.c + (self.g / G**self.gamma + self.a) / N**self.alpha + self.b / D**self.beta


# The coefficients of the same paper for dense models.
DENSE_OF_GRANULARITY_LAW = GranularityLaw(
    a=16.3, alpha=0.126, b=26.7, beta=0.127, g=0.0, gamma=0.0, c=0.47
)

# FLOPs per parameter and token of matmuls, and per logit of the router (Krajewski et al.).
MATMUL_FLOPS = 6
ROUTER_FLOPS = 14


class FineGrainedShape(NamedTuple):
    """The shape of a fine-grained MoE model, as real numbers.

    The dense model behind it has 12 D^2 parameters per block and 64 blocks per unit of depth:
    dim = 64 * num_blocks.
    """

    dim: float
    num_blocks: float

    def parameters(self, expansion: float) -> float:
        """Returns all parameters without embeddings, for an expansion rate E."""
        return self.dim**2 * (8 * expansion + 4) * self.num_blocks

    def flops_per_token(self, expansion: float, granularity: float) -> float:
        """Returns training FLOPs per token, including the router's."""
        matmuls = 12 * self.dim**2 * MATMUL_FLOPS
        router = self.dim * expansion * granularity * ROUTER_FLOPS
        return (matmuls + router) * self.num_blocks


def fine_grained_shape(base_parameters: float) -> FineGrainedShape:
    """Returns the shape whose dense model has `base_parameters` without embeddings."""
    dim = (64 * base_parameters / 12) ** (1 / 3)
    return FineGrainedShape(dim, dim / 64)


@dataclasses.dataclass(frozen=True)
class JointLaw:
    """Ludziejewski et al. 2025 (Joint MoE Scaling Laws): loss in nats.

    L = a E^delta N^(alpha + gamma ln E) + b E^omega D^(beta + zeta ln E) + c, with E the saturating
    number of experts.
    """

    a: float = 35.91
    alpha: float = -0.1889
    delta: float = -0.2285
    gamma: float = 0.0098
    b: float = 35.98
    beta: float = -0.1775
    omega: float = 0.5529
    zeta: float = -0.0259
    start: float = 2.0732
    end: float = 290.4521
    c: float = 1.3637

    def exponents(self, experts: Value) -> tuple[Value, Value]:
        """Returns the exponents of active parameters and of tokens, for E experts."""
        log_experts = np.log(saturating_experts(experts, self.start, self.end))
        return self.alpha + self.gamma * log_experts, self.beta + self.zeta * log_experts

    def loss(self, active_parameters: Value, tokens: Value, experts: Value = 1) -> Value:
        """Returns the loss.

        Args:
            active_parameters: parameters that a token uses, embeddings included, N_act.
            tokens: training tokens, D.
            experts: number of experts, of which one is used, E; 1 for a dense model.
        """
        _warn_outside(
            "joint law",
            active_parameters=(active_parameters, 0, 2.7e9),
            experts=(experts, 1, 32),
        )
        return self.evaluate(active_parameters, tokens, experts)

    def evaluate(self, active_parameters: Value, tokens: Value, experts: Value = 1) -> Value:
        """Returns the loss as `loss` does, without warnings."""
        N = np.asarray(active_parameters, np.float64)
        D = np.asarray(tokens, np.float64)
        saturating = saturating_experts(experts, self.start, self.end)
        of_parameters, of_tokens = self.exponents(experts)
        capacity = self.a * saturating**self.delta * N**of_parameters
        data = self.b * saturating**self.omega * D**of_tokens
        return capacity + data + self.c

    @staticmethod
    def learning_rate(active_parameters: Value, experts: Value = 1) -> Value:
        """Returns the best peak learning rate.

        Args:
            active_parameters: parameters that a token uses, without embeddings.
            experts: number of experts, of which one is used.
        """
        return np.exp(8.39 - 0.81 * np.log(active_parameters) - 0.25 * np.log(experts))


@dataclasses.dataclass(frozen=True)
class EfficiencyLeverage:
    """Ling, Towards Greater Leverage (2025): dense compute over MoE compute at equal loss.

    EL = A_hat^(alpha + gamma (log2 G)^2 + beta log2 G), alpha = a + d log10 C. The paper does not
    print the bases of its logarithms; these are the only ones that reproduce its two examples.
    """

    a: float = 1.23
    d: float = -7.61e-2
    gamma: float = 1.67e-2
    beta: float = -1.17e-1
    start: float = 1.63e-2
    end: float = 5.28e16

    def best_granularity(self) -> float:
        """Returns the granularity with the greatest leverage, 2^(-beta / (2 gamma))."""
        return 2 ** (-self.beta / (2 * self.gamma))

    def saturating_ratio(self, activation_ratio: Value) -> Value:
        """Returns A_hat of an activation ratio A."""
        shift = 1 / (1 / self.start - 1 / self.end)
        return 1 / (1 / (np.asarray(activation_ratio, np.float64) + shift) + 1 / self.end)

    def leverage(self, activation_ratio: Value, granularity: Value, compute: Value) -> Value:
        """Returns the leverage.

        Args:
            activation_ratio: active experts over all experts, shared ones included, A.
            granularity: 2 * model dimension / width of an expert, G.
            compute: training FLOPs without embeddings, C.
        """
        _warn_outside("efficiency leverage", activation_ratio=(activation_ratio, 0, 1))
        log_granularity = np.log2(granularity)
        exponent = (
            self.a
            + self.d * np.log10(compute)
            + self.gamma * log_granularity**2
            + self.beta * log_granularity
        )
        return self.saturating_ratio(activation_ratio) ** exponent


class LingAllocation:
    """Ling's compute-optimal models and hyperparameters, by training FLOPs C."""

    @staticmethod
    def flops_per_token(compute: Value, is_dense: bool = False) -> Value:
        """Returns the best forward FLOPs per token without embeddings, M."""
        return 0.0655 * compute**0.5422 if is_dense else 0.1915 * compute**0.5095

    @staticmethod
    def tokens(compute: Value, is_dense: bool = False) -> Value:
        """Returns the best number of training tokens, D."""
        return 15.2582 * compute**0.4578 if is_dense else 5.2232 * compute**0.4905

    @staticmethod
    def learning_rate(compute: Value) -> Value:
        """Returns the best peak learning rate, for a warmup-stable-decay schedule."""
        return 1.1576 * compute**-0.1529

    @staticmethod
    def batch_tokens(compute: Value) -> Value:
        """Returns the best batch size, in tokens."""
        return 0.0694 * compute**0.3644


@dataclasses.dataclass(frozen=True)
class ComprehensiveLaw:
    """Tencent 2025 (Towards a Comprehensive Scaling Law of Mixture-of-Experts): loss in nats.

    L = (e G + f / G + m S^2 + n S) (N^-alpha + k N_a^-alpha + h N_a / N) + a N^-alpha + b D^-beta
    + c N_a^-alpha + epsilon. Its coefficients are known from reports of the paper only.
    """

    e: float = 0.1577
    f: float = 7.2446
    m: float = 5.1395
    n: float = -3.2363
    k: float = 0.0013
    h: float = 0.0450
    a: float = 38.051
    alpha: float = 0.2383
    b: float = 27129.0
    beta: float = 0.4694
    c: float = 31.096
    epsilon: float = 1.8182

    def best_granularity(self) -> float:
        """Returns the number of active experts with the lowest loss, sqrt(f / e)."""
        return math.sqrt(self.f / self.e)

    def best_shared_ratio(self) -> float:
        """Returns the share of shared experts with the lowest loss, -n / (2 m)."""
        return -self.n / (2 * self.m)

    def loss(
        self,
        parameters: Value,
        active_parameters: Value,
        tokens: Value,
        granularity: Value,
        shared_ratio: Value,
    ) -> Value:
        """Returns the loss.

        Args:
            parameters: all parameters, N.
            active_parameters: parameters that a token uses, N_a.
            tokens: training tokens, D.
            granularity: number of active experts, G.
            shared_ratio: shared experts over active experts, S.
        """
        N = np.asarray(parameters, np.float64)
        active = np.asarray(active_parameters, np.float64)
        shape = (
            self.e * granularity
            + self.f / granularity
            + self.m * shared_ratio**2
            + self.n * shared_ratio
        )
        size = N**-self.alpha + self.k * active**-self.alpha + self.h * active / N
        return (
            shape * size
            + self.a * N**-self.alpha
            + self.b * np.asarray(tokens, np.float64) ** -self.beta
            + self.c * active**-self.alpha
            + self.epsilon
        )


@dataclasses.dataclass(frozen=True)
class RoutedLaw:
    """Clark et al. 2022 (Unified Scaling Laws for Routed Language Models): loss in nats.

    log10 L = a log10 N + b log10 E + c log10 N log10 E + d, with E the saturating number of
    experts. The default coefficients are those of S-BASE routing.
    """

    a: float = -0.082
    b: float = -0.108
    c: float = 0.009
    d: float = 1.104
    start: float = 1.847
    end: float = 314.478

    def loss(self, dense_parameters: Value, experts: Value = 1) -> Value:
        """Returns the loss.

        Args:
            dense_parameters: parameters of the dense model with the same FLOPs, N.
            experts: number of experts, of which one is used, E.
        """
        _warn_outside(
            "routed law",
            dense_parameters=(dense_parameters, 1.5e7, 1.3e9),
            experts=(experts, 1, 512),
        )
        return self.evaluate(dense_parameters, experts)

    def evaluate(self, dense_parameters: Value, experts: Value = 1) -> Value:
        """Returns the loss as `loss` does, without warnings."""
        log_n = np.log10(dense_parameters)
        log_e = np.log10(saturating_experts(experts, self.start, self.end))
        return 10 ** (self.a * log_n + self.b * log_e + self.c * log_n * log_e + self.d)


@dataclasses.dataclass(frozen=True)
class ChinchillaLaw:
    """Hoffmann et al. 2022, with the coefficients of Besiroglu et al. 2024: loss in nats.

    L = E + A / N^alpha + B / D^beta.
    """

    E: float = 1.8172
    A: float = 482.01
    B: float = 2085.43
    alpha: float = 0.3478
    beta: float = 0.3658

    def loss(self, parameters: Value, tokens: Value) -> Value:
        """Returns the loss for N parameters, embeddings included, and D training tokens."""
        _warn_outside(
            "Chinchilla law",
            parameters=(parameters, 4.4e7, 1.6e10),
            tokens=(tokens, 1e9, 5e11),
        )
        return self.evaluate(parameters, tokens)

    def evaluate(self, parameters: Value, tokens: Value) -> Value:
        """Returns the loss as `loss` does, without warnings."""
        N = np.asarray(parameters, np.float64)
        D = np.asarray(tokens, np.float64)
        return self.E + self.A / N**self.alpha + self.B / D**self.beta


class StepLaw:
    """Li et al. 2025 (Predictable Scale, part I: Step Law): the best hyperparameters."""

    @staticmethod
    def learning_rate(parameters: Value, tokens: Value) -> Value:
        """Returns the best peak learning rate, for N parameters without embeddings, D tokens."""
        return 1.79 * np.asarray(parameters, np.float64) ** -0.713 * tokens**0.307

    @staticmethod
    def batch_tokens(tokens: Value) -> Value:
        """Returns the best batch size in tokens, for D training tokens."""
        return 0.58 * np.asarray(tokens, np.float64) ** 0.571


class Optimum(NamedTuple):
    """The best model for a budget of compute.

    Attributes:
        size: the size that was searched: parameters, active parameters, or those of a base model.
        tokens: training tokens.
        loss: predicted loss in nats.
        granularity: granularity; 1 for laws without it.
    """

    size: float
    tokens: float
    loss: float
    granularity: float = 1.0


def best_granular_model(
    compute: float,
    expansion: float = 64,
    granularities: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128),
    law: GranularityLaw | None = None,
) -> Optimum:
    """Returns the compute-optimal model of the granularity law; `size` is that of its dense model.

    Args:
        compute: training FLOPs, the router's included.
        expansion: expansion rate E.
        granularities: the values of G that are compared.
        law: the coefficients; None for the published ones.
    """
    law = law or GranularityLaw()

    def best_size(granularity: int) -> Optimum:
        def optimum(log_size: float) -> Optimum:
            shape = fine_grained_shape(math.exp(log_size))
            tokens = compute / shape.flops_per_token(expansion, granularity)
            loss = law.evaluate(shape.parameters(expansion), tokens, granularity)
            return Optimum(math.exp(log_size), tokens, float(loss), granularity)

        return _minimize(optimum, math.log(1e5), math.log(1e13))

    return min(map(best_size, granularities), key=lambda found: found.loss)


def best_joint_model(compute: float, experts: int = 1, law: JointLaw | None = None) -> Optimum:
    """Returns the compute-optimal model of the joint law, with 6 * N_act * D = compute."""
    law = law or JointLaw()

    def optimum(log_size: float) -> Optimum:
        size = math.exp(log_size)
        tokens = compute / (6 * size)
        return Optimum(size, tokens, float(law.evaluate(size, tokens, experts)))

    return _minimize(optimum, math.log(1e5), math.log(1e13))


def _minimize(optimum: Callable[[float], Optimum], low: float, high: float) -> Optimum:
    """Returns the lowest loss between two logarithms of a size, by a golden-section search.

    It assumes that the loss falls and then rises.
    """
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-9:
        left = high - ratio * (high - low)
        right = low + ratio * (high - low)
        if optimum(left).loss < optimum(right).loss:
            high = right
        else:
            low = left
    return optimum((low + high) / 2)
