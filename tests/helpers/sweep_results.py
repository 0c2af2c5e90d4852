"""Writes the workdir of a sweep whose runs were never trained, for tests of its report.

The losses are given by a function, and logs and results have the form of real ones.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from modse_jax.config.options import Config
from modse_jax.sweeps import definition, description, results
from modse_jax.sweeps.definition import Arm, ResolvedArm, Sweep, choices, product, seeds
from modse_jax.sweeps.description import Claims
from modse_jax.sweeps.identity import RunIdentity
from modse_jax.sweeps.results import SweepDirectory
from tests.helpers.configs import tiny_config

STEPS = 100
LOG_EVERY = 5
CODE = "code of this sweep"
DENSE_WIDTH = 48


class Outcome(NamedTuple):
    """The end of a run.

    Attributes:
        loss: its last validation loss; None if it has no logs.
        state: a state of `results`; WAITING and UNFINISHED write no result.
        dropped: the share of its routed tokens that were dropped.
    """

    loss: float | None
    state: str = results.FINISHED
    dropped: float = 0.0


def base_config() -> Config:
    """Returns the config that all arms override: one expert as wide as the dense FFN."""
    return tiny_config(
        moe=dict(
            num_experts=1,
            top_k=1,
            width=DENSE_WIDTH,
            widths=(),
            pairs=False,
            flop_matched_width=DENSE_WIDTH,
        ),
        training=dict(steps=STEPS, log_every=LOG_EVERY),
    )


def experts(count: int, parts: int) -> dict:
    """Returns the options of experts of granularity 1 / parts, of which a token uses `parts`."""
    return {"moe.num_experts": count, "moe.top_k": parts, "moe.width": DENSE_WIDTH // parts}


def dense() -> dict:
    """Returns the options of a dense model."""
    return {"model.dense_width": DENSE_WIDTH}


def rates(*peaks: float) -> list[Arm]:
    """Returns an arm for every peak of the learning rate, whose end is a tenth of it."""
    return choices(
        {
            f"rate={peak:g}": {
                "optimizer.learning_rate": peak,
                "optimizer.final_learning_rate": 0.1 * peak,
            }
            for peak in peaks
        }
    )


def write_sweep(
    root: pathlib.Path,
    arms: Sequence[Arm],
    outcome: Callable[[Arm, Config], Outcome],
    claims: Claims | None = None,
    name: str = "synthetic",
) -> SweepDirectory:
    """Writes the workdir of a sweep and returns it.

    Args:
        root: the workdir.
        arms: the arms.
        outcome: returns what happened to an arm with its config.
        claims: what the sweep file states.
        name: the name of the sweep.
    """
    directory = SweepDirectory(root)
    root.mkdir(parents=True)
    resolved = resolve(arms)
    identities = {arm.name: identify(arm) for arm in resolved}
    description.write(directory, name, identities, claims or Claims(fixed={"tokens": 0}))
    for arm, of_arm in zip(arms, resolved):
        write_run(directory, identities[arm.name], outcome(arm, of_arm.config))
    results.rebuild_tables(directory, name, identities)
    return directory


def resolve(arms: Sequence[Arm]) -> list[ResolvedArm]:
    """Returns arms with complete configs, which override `base_config`."""
    return definition.resolve_arms(Sweep(arms=[a._replace(config=base_config()) for a in arms]))


def identify(arm: ResolvedArm, code: str = CODE) -> RunIdentity:
    """Returns the identity of the run of an arm."""
    return RunIdentity(arm.config, "data", code)


def write_run(directory: SweepDirectory, identity: RunIdentity, outcome: Outcome) -> None:
    """Writes the logs and the result of a run."""
    if outcome.state == results.WAITING:
        return
    training = directory.training(identity.id)
    training.mkdir(parents=True)
    if outcome.loss is not None:
        write_logs(training, identity.config, outcome)
    if outcome.state != results.UNFINISHED:
        reason = "the process died" if outcome.state == results.FAILED else ""
        results.write_result(directory, identity, outcome.state, reason)


def write_logs(training: pathlib.Path, config: Config, outcome: Outcome) -> None:
    """Writes metrics.jsonl and routing.jsonl as a run would."""
    assert outcome.loss is not None
    rng = np.random.default_rng([config.seed, config.moe.num_experts, config.moe.top_k])
    tokens = config.training.batch_size * config.data.sequence_length
    seconds = 0.01 * (1 + 0.05 * config.moe.top_k)
    metrics, routing = [], []
    for step in range(LOG_EVERY, STEPS + 1, LOG_EVERY):
        loss = outcome.loss + 2.0 * (step / STEPS) ** -0.3 - 2.0 + 0.02 * rng.standard_normal()
        row = {"step": step, "split": "train", "tokens": step * tokens, "loss": loss}
        row |= {"bits_per_byte": loss / 3, "skipped_steps": 0, "step_seconds": seconds}
        metrics.append(row)
        routing += route(config, rng, step, "train", tokens, outcome.dropped)
        if step in (STEPS // 2, STEPS):
            validation = outcome.loss + 2.0 * (step / STEPS) ** -0.3 - 2.0
            row = {"step": step, "split": "validation", "loss": validation}
            metrics.append({**row, "bits_per_byte": validation / 3})
            routing += route(config, rng, step, "validation", tokens, 2 * outcome.dropped)
    write_lines(training / "metrics.jsonl", metrics)
    if not config.is_dense:
        write_lines(training / "routing.jsonl", routing)


def route(
    config: Config,
    rng: np.random.Generator,
    step: int,
    split: str,
    tokens: int,
    dropped: float,
) -> list[dict]:
    """Returns the lines of routing.jsonl of a step: unevenly loaded experts."""
    if config.is_dense:
        return []
    rows = []
    for layer in range(config.model.num_layers):
        share = rng.dirichlet(np.full(config.num_experts, 10.0 * (1 + step / STEPS)))
        counts = rng.multinomial(tokens * config.top_k, share)
        count = round(dropped * tokens * config.top_k)
        row = {"step": step, "split": split, "layer": layer, "dropped": count}
        rows.append({**row, "tokens_per_expert": counts.tolist()})
    return rows


def write_lines(path: pathlib.Path, rows: list[dict]) -> None:
    """Writes rows as a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- one sweep that has everything ---------------------------------------------------------------

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SHAPES = {
    "dense": dense(),
    "n4 g1": experts(4, 1),
    "n8 g1": experts(8, 1),
    "n4 g1/4": experts(4, 4),
    "n8 g1/4": experts(8, 4),
    "capacity": {**experts(8, 4), "moe.capacity_factor": 1.0},
}

# The best rate, and the loss at it, of every shape.
OPTIMA = {
    "dense": (3e-3, 3.50),
    "n4 g1": (3e-3, 3.40),
    "n8 g1": (1e-2, 3.35),
    "n4 g1/4": (1e-2, 3.42),
    "n8 g1/4": (1e-2, 3.30),
    "capacity": (3e-3, 3.345),
}


def everything(root: pathlib.Path) -> SweepDirectory:
    """Writes a sweep of six shapes, four rates and three seeds, in which not all went well.

    "n8 g1" has failed at one rate for seed 2; "n8 g1/4" has diverged at the highest rate;
    "capacity" waits for seed 2 at all rates and is unfinished at one; one result is of other code.
    """
    arms = product(choices(SHAPES), rates(*RATES), seeds(0, 1, 2))
    directory = write_sweep(root, arms, outcome_of_everything)
    (old,) = resolve(arms[:1])
    write_run(directory, identify(old, code="older code"), Outcome(9.9))
    return directory


def outcome_of_everything(arm: Arm, config: Config) -> Outcome:
    """Returns what happened to an arm of `everything`."""
    shape, _, rest = arm.name.partition(" rate=")
    rate, seed = config.optimizer.learning_rate, config.seed
    if shape == "n8 g1" and rest == "0.01 seed=2":
        return Outcome(None, results.FAILED)
    if shape == "n8 g1/4" and rate == RATES[-1]:
        return Outcome(8.0, results.DIVERGED)
    if shape == "capacity" and seed == 2:
        return Outcome(4.0, results.UNFINISHED if rate == RATES[0] else results.WAITING)
    return Outcome(loss_of(shape, rate, seed), dropped=0.04 if shape == "capacity" else 0.0)


def loss_of(shape: str, rate: float, seed: int) -> float:
    """Returns a loss: a parabola in the logarithm of the rate, and effects of seed and shape."""
    best, lowest = OPTIMA[shape]
    own = np.random.default_rng([seed, *shape.encode()]).normal(0, 0.004)
    return lowest + 0.15 * np.log10(rate / best) ** 2 + 0.02 * seed + own
