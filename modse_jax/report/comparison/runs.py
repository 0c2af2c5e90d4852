"""Reads the runs of a sweep's workdir.

Only results with the config, data and code of the sweep are its runs. Others are kept apart.
"""

import pathlib
from typing import Any, NamedTuple

from modse_jax.config.options import Config
from modse_jax.errors import UserError
from modse_jax.sweeps import description, results
from modse_jax.sweeps.description import Claims
from modse_jax.sweeps.results import SweepDirectory
from modse_jax.training import run_logs


class Seed(NamedTuple):
    """The seeds of a run. Runs with the same seeds are paired."""

    parameters: int
    order: int

    def __str__(self) -> str:
        """Returns one number if both are equal, as `definition.seeds` makes them."""
        if self.parameters == self.order:
            return str(self.parameters)
        return f"{self.parameters} (order {self.order})"


class Run(NamedTuple):
    """A run of a sweep, or a result that is kept apart.

    Attributes:
        arm: the name of its arm; of a result that is kept apart, that of the arm with its config,
            or "".
        id: its identity.
        state: a state of `results`.
        config: its config; None if it is not known, which only runs without a result may have.
        metrics: the metrics of its result, and "macro_loss"; {} without a result.
        reason: why it failed.
        revision: the commit of the code that trained it.
        apart_because: why it is kept apart; "" for a run of the sweep.
    """

    arm: str
    id: str
    state: str
    config: Config | None
    metrics: dict[str, Any]
    reason: str = ""
    revision: str = ""
    apart_because: str = ""

    @property
    def rate(self) -> float:
        """Returns the peak learning rate."""
        assert self.config is not None
        return self.config.optimizer.learning_rate

    @property
    def seed(self) -> Seed:
        """Returns the seeds."""
        assert self.config is not None
        return Seed(self.config.seed, self.config.data.shuffle_seed)


class SweepRuns(NamedTuple):
    """The contents of the workdir of a sweep.

    Attributes:
        name: the name of the sweep.
        runs: a run for every arm, in the order of the sweep.
        others: results that are kept apart.
        claims: what the sweep file states; None if the workdir is of an older version.
    """

    name: str
    runs: list[Run]
    others: list[Run]
    claims: Claims | None


def read_sweep(directory: SweepDirectory) -> SweepRuns:
    """Reads the workdir of a sweep.

    Raises:
        UserError: it is not the workdir of a sweep, a file is damaged or of another sweep, or no
            run of the sweep has finished.
    """
    _check_workdir(directory)
    described = description.read(directory)
    runs = [_read_run(directory, arm) for arm in described.arms]
    others = _read_others(directory, described.arms)
    if not any(run.state == results.FINISHED for run in runs):
        states = ", ".join(f"{sum(r.state == s for r in runs)} {s}" for s in _states(runs))
        apart = (
            f"; results of other code, data or arms do not count: {len(others)}" if others else ""
        )
        raise UserError(
            f"no run of the sweep in {directory.root} has finished ({states}{apart}); run `sweep` "
            "with the same --workdir until one has"
        )
    return SweepRuns(described.sweep, runs, others, described.claims)


def _check_workdir(directory: SweepDirectory) -> None:
    root = directory.root
    if not root.is_dir():
        raise UserError(f"--workdir={root} is not a directory; name the workdir of a sweep")
    if directory.description.exists():
        return
    if (root / "metrics.jsonl").exists():
        raise UserError(
            f"--workdir={root} holds one run, not a sweep; the report of a run is in its folder "
            "report/"
        )
    raise UserError(
        f"--workdir={root} holds no sweep (no {directory.description.name}); name the workdir that "
        "was given to `sweep`"
    )


def _states(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(run.state for run in runs))


def _read_run(directory: SweepDirectory, arm: description.DescribedArm) -> Run:
    result = results.read_result(directory, arm.id)
    if result is None:
        state = results.state_without_result(directory, arm.id)
        return Run(arm.name, arm.id, state, arm.config, {})
    return _make_run(directory, result, arm.name)


def _read_others(directory: SweepDirectory, arms: list[description.DescribedArm]) -> list[Run]:
    """Returns the results that are not those of the arms."""
    names = {arm.config: arm.name for arm in arms if arm.config is not None}
    codes = [arm.code for arm in arms if arm.code]
    found = []
    for result in results.find_other_results(directory, {arm.id for arm in arms}):
        reason = results.explain_apart(result, codes[0] if codes else "", names)
        name = names.get(results.read_config(result), "")
        found.append(_make_run(directory, result, name)._replace(apart_because=reason))
    return found


def _make_run(directory: SweepDirectory, result: results.Result, name: str) -> Run:
    macro_loss = _read_macro_loss(directory.training(result["id"]))
    return Run(
        arm=name,
        id=result["id"],
        state=result["state"],
        config=results.read_config(result),
        metrics={**result["metrics"], "macro_loss": macro_loss},
        reason=result["reason"],
        revision=result["revision"],
    )


def _read_macro_loss(training: pathlib.Path) -> float | None:
    """Returns the macro-average of the last validation; None if there are no validation sets."""
    path = training / "metrics.jsonl"
    rows = run_logs.read_log(path) if path.exists() else []
    found = [row["macro_loss"] for row in rows if "macro_loss" in row]
    return found[-1] if found else None
