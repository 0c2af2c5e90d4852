"""Converts a sweep file into runs: checks it, prepares the data, and names every run.

All checks of the sweep file come before anything is written.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from modse_jax.config.options import Config
from modse_jax.data import data_card, prepared_data, tokenizers, training_data, validation_sets
from modse_jax.errors import UserError
from modse_jax.runtime import processes
from modse_jax.runtime.lock import wait_for_lock
from modse_jax.sweeps import definition, description, matching
from modse_jax.sweeps.definition import ResolvedArm
from modse_jax.sweeps.description import Claims
from modse_jax.sweeps.identity import RunIdentity, hash_values
from modse_jax.sweeps.results import SweepDirectory
from modse_jax.training import hyperparameters

# Entries that a sweep may leave if it is killed before it writes sweep.json.
BEFORE_DESCRIPTION = {"data", ".lock", "sweep.json.tmp"}


class PlannedRun(NamedTuple):
    """A run of a sweep.

    Attributes:
        name: the name of its arm.
        identity: decides if a stored result is that of this run: a hash of the config as the
            sweep file gives it, of the data and of the code.
        config: the same config, but with the path of the prepared data as its source.
    """

    name: str
    identity: RunIdentity
    config: Config


def sweep_name(path: str) -> str:
    """Returns the name of the sweep of a file, which is that of the file."""
    return pathlib.Path(path).stem


class LoadedSweep(NamedTuple):
    """A sweep file whose arms have been checked.

    Attributes:
        arms: its arms.
        claims: what it states about them.
    """

    arms: list[ResolvedArm]
    claims: Claims


def load_sweep(path: str) -> LoadedSweep:
    """Loads a sweep file, checks its arms, and prints a warning if there is one.

    Raises:
        UserError: the file or its arms are invalid; see `definition` and `matching`.
    """
    sweep = definition.load_sweep(path)
    arms = definition.resolve_arms(sweep)
    matching.check_matched(sweep, arms)
    warning = matching.find_missing_rates(sweep.compares_shapes, arms)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    return LoadedSweep(arms, Claims.of(sweep))


def plan_runs(directory: SweepDirectory, name: str, sweep: LoadedSweep) -> list[PlannedRun]:
    """Prepares the data of all arms, and writes sweep.json.

    Args:
        directory: the workdir of the sweep.
        name: the name of the sweep.
        sweep: the sweep.

    Raises:
        UserError: the workdir is not that of this sweep, or the data is invalid. Nothing that this
            call has made remains.
    """
    check_directory(directory, name)
    configs_by_key = _group_by_data(sweep.arms)
    for key, config in configs_by_key.items():
        training_data.check_source(config, directory.data / key)
    with wait_for_lock(directory.root / ".lock"):
        data_by_key = {
            key: training_data.load(config, directory.data / key)
            for key, config in configs_by_key.items()
        }
        runs = _name_runs(directory, sweep.arms, data_by_key)
        description.write(directory, name, identities(runs), sweep.claims)
    return runs


def _name_runs(
    directory: SweepDirectory,
    arms: Sequence[ResolvedArm],
    data_by_key: Mapping[str, training_data.TrainingData],
) -> list[PlannedRun]:
    """Returns the run of every arm, whose data has been loaded."""
    code = processes.source_digest()
    runs = []
    for arm in arms:
        key = _data_key(arm.config)
        identity = RunIdentity(arm.config, _fingerprint(data_by_key[key]), code)
        config = _name_prepared_data(arm.config, directory.data / key)
        runs.append(PlannedRun(arm.name, identity, config))
    return runs


def check_directory(directory: SweepDirectory, name: str) -> None:
    """Raises UserError if a workdir belongs to something other than the sweep of this name."""
    root = directory.root
    if directory.description.exists():
        found = description.read_name(directory)
        if found != name:
            raise UserError(
                f"{root} holds the sweep {found!r}, not {name!r}; use another --workdir"
            )
        return
    if root.exists() and not root.is_dir():
        raise UserError(f"--workdir={root} is a file; name a directory")
    if root.exists() and any(path.name not in BEFORE_DESCRIPTION for path in root.iterdir()):
        raise UserError(
            f"--workdir={root} is not empty and holds no sweep (no sweep.json); name another "
            "directory"
        )


def _group_by_data(arms: Sequence[ResolvedArm]) -> dict[str, Config]:
    """Returns {key of the data: config of the first arm that uses it}."""
    configs: dict[str, Config] = {}
    for arm in arms:
        configs.setdefault(_data_key(arm.config), arm.config)
    return configs


def _data_key(config: Config) -> str:
    """Returns a hash of the options that decide which records a run reads."""
    options = dataclasses.asdict(config.data)
    del options["shuffle_seed"]
    is_trained = config.data.tokenizer == tokenizers.TRAINED_ON_SOURCE
    return hash_values([options, config.model.vocab_size if is_trained else 0])


def _fingerprint(data: training_data.TrainingData) -> str:
    """Returns a hash of the content of the training data and of all validation sets."""
    return hash_values([data.fingerprint, data.set_fingerprints])


def _name_prepared_data(config: Config, workdir: pathlib.Path) -> Config:
    """Returns a config that names what `training_data.load` has prepared in a workdir."""
    data = config.data
    if (workdir / "data" / data_card.CARD_NAME).exists():
        data = dataclasses.replace(data, source=_prepared(workdir / "data"))
    sets = tuple(
        (name, _prepared_set(workdir, name, source)) for name, source in data.validation_sources
    )
    return dataclasses.replace(config, data=dataclasses.replace(data, validation_sources=sets))


def _prepared_set(workdir: pathlib.Path, name: str, source: str) -> str:
    if prepared_data.prepared_directory(source) is not None:
        return source
    return _prepared(validation_sets.on_the_fly_directory(workdir, name))


def _prepared(directory: pathlib.Path) -> str:
    return f"{prepared_data.PREPARED_PREFIX}{directory}"


def order_by_shape(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Returns runs such that those of one shape, which share a compiled step, are together.

    Shapes are in the order of their first runs, and the runs of a shape keep their order.
    """
    by_shape: dict[Config, list[PlannedRun]] = {}
    for run in runs:
        by_shape.setdefault(hyperparameters.shared_program_config(run.config), []).append(run)
    return [run for group in by_shape.values() for run in group]


def identities(runs: Sequence[PlannedRun]) -> Mapping[str, RunIdentity]:
    """Returns {name of the arm: identity of its run}."""
    return {run.name: run.identity for run in runs}
