"""The start of a run, up to its first step: checks, data, restored state, compiled programs."""

import contextlib
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any, NamedTuple

from modse_jax.config.loading import differences, from_saved, override_options, to_saved
from modse_jax.config.options import Config
from modse_jax.data import data_card, training_data
from modse_jax.errors import ExitCode
from modse_jax.moe import expert_placement
from modse_jax.runtime import files, peak_rate, processes
from modse_jax.study import model_table
from modse_jax.training import (
    auxiliary_losses,
    console,
    preflight,
    restore,
    run_description,
    run_metadata,
    validation_schedule,
    workdir_checks,
)
from modse_jax.training.checkpointing import Checkpoints
from modse_jax.training.preflight import Setup
from modse_jax.training.programs import CompiledStep, Programs
from modse_jax.training.train_step import ScoreStep, State


@dataclasses.dataclass(frozen=True)
class RunContext:
    """Everything about a run that stays the same while it trains.

    Attributes:
      config: the config.
      workdir: the directory of the run.
      setup: mesh, placement and kernels.
      data: the datasets and their mixture.
      checkpoints: the checkpoints in the workdir.
      metadata: metadata of every checkpoint, except the validation loss.
      compiled_step: the compiled training step; None if no step is left.
      score_step: the jitted scoring step for validation.
      peak_flops: FLOP/s of all devices together; None if unknown.
      started_at: `time.monotonic()` at the start.
    """

    config: Config
    workdir: pathlib.Path
    setup: Setup
    data: training_data.TrainingData
    checkpoints: Checkpoints
    metadata: dict[str, Any]
    compiled_step: CompiledStep | None
    score_step: ScoreStep
    peak_flops: float | None
    started_at: float


class PreparedRun(NamedTuple):
    """A run that has passed all checks but has not changed its workdir yet.

    Attributes:
      context: everything that stays the same.
      restored: the checkpoint from which it resumes, if there is one.
    """

    context: RunContext
    restored: restore.Restored


class StartedRun(NamedTuple):
    """A run that is ready to train.

    Attributes:
      context: everything that stays the same.
      step: number of steps that were completed before this start; 0 for a new run.
      state: the state after that many steps.
      is_validation_missing: True if an earlier process was stopped before the validation that was
        due for `state`.
    """

    context: RunContext
    step: int
    state: State
    is_validation_missing: bool


def start_run(
    config: Config, workdir: pathlib.Path, cleanup: contextlib.ExitStack, programs: Programs
) -> StartedRun | ExitCode:
    """Starts or resumes a run, up to its first step.

    Checkpoints, logs and config.json are not touched before all checks have passed. Only the lock
    file, and data that is prepared on the fly, are written earlier.

    Args:
      config: the config.
      workdir: the directory of the run.
      cleanup: frees the lock and waits for the last checkpoint when it closes.
      programs: compiles the programs of the run.

    Returns:
      The run; or how it ended, FINISHED or DIVERGED, if the workdir holds the complete run already.
      Then options that do not change its training may still be changed in its config.json.

    Raises:
      UserError: a check failed.
    """
    context, restored = prepare_run(config, workdir, cleanup, programs)
    # From here on the run changes the workdir.
    for message in context.checkpoints.start_writing(restored.damaged, restored.rewind_to):
        console.log(message)
    is_validation_missing = processes.broadcast_from_main(
        lambda: validation_schedule.is_validation_missing(workdir, restored.step, config.training)
    )
    if restored.step >= config.training.steps and not is_validation_missing:
        context.checkpoints.close()
        return _end_complete_run(config, workdir, restored.step)
    write_description(config, workdir)
    state = first_state(context, restored, programs)
    log_description(context)
    processes.wait_for_all()
    return StartedRun(context, restored.step, state, is_validation_missing)


def _end_complete_run(config: Config, workdir: pathlib.Path, step: int) -> ExitCode:
    """Saves changed options of a run without further steps; prints and returns how it ended."""
    changes, has_diverged = processes.broadcast_from_main(
        lambda: [_save_changed_options(config, workdir), _has_diverged(workdir, step)]
    )
    if changes:
        console.log(f"changed in {workdir / 'config.json'}: {'; '.join(changes)}")
    if has_diverged:
        console.log(validation_schedule.describe_nonfinite(step, workdir), file=sys.stderr)
        return ExitCode.DIVERGED
    console.log(f"finished: {workdir} holds step {step} of {config.training.steps}; nothing to do")
    return ExitCode.FINISHED


def _save_changed_options(config: Config, workdir: pathlib.Path) -> list[str]:
    """Writes config.json if options differ; returns a line `name: old -> new` for each of them.

    training.steps stays that of the training, because it sets the learning rate of every step.
    """
    saved = from_saved(files.read_json(workdir / "config.json"))
    steps = {"training.steps": saved.training.steps}
    changed = override_options(config, steps)
    lines = differences(saved, changed)
    if lines:
        write_config(changed, workdir)
    return lines


def _has_diverged(workdir: pathlib.Path, step: int) -> bool:
    validation = validation_schedule.read_validation(workdir, step)
    return validation is not None and not validation_schedule.is_loss_finite(validation)


def prepare_run(
    config: Config, workdir: pathlib.Path, cleanup: contextlib.ExitStack, programs: Programs
) -> PreparedRun:
    """Makes all checks, loads the data, restores the state and compiles the training step.

    See `start_run` for the arguments.
    """
    started_at = time.monotonic()
    setup = preflight.run_preflight_checks(config, workdir)
    workdir_checks.lock_workdir(workdir, cleanup)
    data = load_data(config, workdir)
    checkpoints = open_checkpoints(config, workdir, setup)
    cleanup.callback(checkpoints.settle)
    metadata = run_metadata.build_metadata(config, data, setup.mesh)
    restored = restore.restore_state(checkpoints, setup.state_shapes, metadata, config)
    data = data._replace(has_independent_seeds=restored.has_independent_seeds)
    is_finished = restored.step >= config.training.steps
    context = RunContext(
        config=config,
        workdir=workdir,
        setup=setup,
        data=data,
        checkpoints=checkpoints,
        metadata={
            **metadata,
            "skipped_data": restored.skipped_data,
            "independent_seeds": restored.has_independent_seeds,
        },
        compiled_step=None if is_finished else compile_step(config, setup, programs),
        score_step=programs.score_step(config, setup.mesh),
        peak_flops=peak_rate.peak_flops(setup.mesh.devices.flat),
        started_at=started_at,
    )
    return PreparedRun(context, restored)


def load_data(config: Config, workdir: pathlib.Path) -> training_data.TrainingData:
    """Loads the data on every process; process 0 prepares it first if necessary."""
    data = processes.on_all_processes(lambda: training_data.load(config, workdir), first_alone=True)
    processes.assert_same(
        {"the data": data.fingerprint, "the validation sets": str(data.set_fingerprints)}
    )
    for dataset in data.datasets:
        console.log(data_card.summarize_card(dataset.card))
    for dataset in data.validation_sets:
        console.log(data_card.summarize_validation_set(dataset.name, dataset.card))
    return data


def open_checkpoints(config: Config, workdir: pathlib.Path, setup: Setup) -> Checkpoints:
    """Opens the checkpoints of a workdir."""
    return Checkpoints(
        workdir / "checkpoints",
        config.checkpoint.keep,
        config.checkpoint.keep_every,
        order=expert_placement.hidden_unit_order(config.widths, setup.placement),
    )


def compile_step(config: Config, setup: Setup, programs: Programs) -> CompiledStep:
    """Returns the compiled training step.

    Raises:
      UserError: on every process, if the step needs more memory than the devices of one of them
        have.
    """
    step = programs.train_step(config, setup.mesh)
    processes.on_all_processes(lambda: preflight.check_step_memory(step.program, setup.mesh))
    return step


def write_description(config: Config, workdir: pathlib.Path) -> None:
    """Writes environment.json, then config.json, which marks the directory as that of a run."""
    if not processes.is_main_process():
        return
    environment = json.dumps(run_description.describe_environment(), indent=2)
    files.write_atomically(workdir / "environment.json", environment + "\n")
    write_config(config, workdir)


def write_config(config: Config, workdir: pathlib.Path) -> None:
    """Writes config.json."""
    files.write_atomically(workdir / "config.json", json.dumps(to_saved(config), indent=2) + "\n")


def first_state(context: RunContext, restored: restore.Restored, programs: Programs) -> State:
    """Returns the restored state, or the initial state if there is none."""
    if restored.state is not None:
        console.log(
            f"resuming step {restored.step} of {context.config.training.steps} from "
            f"{context.workdir / 'checkpoints'}"
        )
        return restored.state
    console.log(f"starting at step 0 in an empty workdir, {context.workdir}")
    return programs.initial_state(context.config, context.setup.mesh)


def log_description(context: RunContext) -> None:
    """Prints parameters, auxiliary losses, kernels and memory, unless no step is left."""
    if context.compiled_step is None:
        return
    console.log(model_table.format_model_table(context.config))
    for line in auxiliary_losses.description_lines(context.config):
        console.log(line)
    for line in auxiliary_losses.router_warnings(context.config):
        console.log(line, file=sys.stderr)
    console.log(context.setup.kernels.line())
    step = context.compiled_step
    console.log(run_description.memory_line(step.program, context.setup.state_shapes, step.seconds))
