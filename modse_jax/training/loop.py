"""The training loop."""

import contextlib
import math
import pathlib
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np

from modse_jax.config.options import Config
from modse_jax.data import batching, prepared_data
from modse_jax.errors import ExitCode, RunError
from modse_jax.runtime import processes, sharding, watchdog
from modse_jax.runtime.signals import Stopped, StopRequest
from modse_jax.training import (
    console,
    metrics,
    replay_check,
    restore,
    run_logs,
    startup,
    train_step,
    validation,
    validation_schedule,
)
from modse_jax.training.programs import Programs
from modse_jax.training.startup import StartedRun
from modse_jax.training.step_timer import StepTimer
from modse_jax.training.train_step import Batch, Metrics


def train(config: Config, workdir: str, programs: Programs | None = None) -> ExitCode:
    """Trains until `training.steps`, resuming from the newest checkpoint in the workdir if any.

    Args:
      config: the config.
      workdir: the directory of the run.
      programs: compiles the programs of the run; None compiles those of this run alone.

    Returns:
      FINISHED, DIVERGED, or STOPPED (by a signal; the same call resumes). A run has diverged if too
      many steps in a row were not finite, or if the loss of its last validation is not.

    Raises:
      UserError: the run cannot start. Nothing has been written.
      RunError: the run had begun and cannot continue.
    """
    workdir_path = pathlib.Path(workdir).expanduser().absolute()
    stop = StopRequest()
    try:
        with contextlib.ExitStack() as cleanup:
            started = startup.start_run(config, workdir_path, cleanup, programs or Programs())
            if isinstance(started, ExitCode):
                return started
            return _train_to_end(Run(started, stop), stop)
    except Stopped:
        print(
            "stopped before the first step; nothing is lost: run the same command to go on",
            file=sys.stderr,
        )
        processes.exit_now(ExitCode.STOPPED)
        return ExitCode.STOPPED
    finally:
        watchdog.cancel()


def _train_to_end(run: "Run", stop: StopRequest) -> ExitCode:
    """Trains step by step. Returns how the run ended."""
    stop.enter_loop(run.mesh)
    validation_loss = None
    if run.is_validation_missing:
        validation_loss = run.validate()
        if validation_loss is None:
            return run.finish(ExitCode.STOPPED)
    while not run.is_complete:
        run.train_step()
        # Queried once per step, because a signal may arrive between two queries.
        is_stopping = stop.requested_anywhere()
        is_saving = run.is_checkpoint_due or is_stopping
        if run.is_validation_due or is_saving:
            run.report()
        if run.has_diverged:
            return run.finish(ExitCode.DIVERGED)

        run.timer.pause()
        validation_loss = None
        if run.is_validation_due and not is_stopping:
            validation_loss = run.validate()
            is_stopping = validation_loss is None
        if is_saving or is_stopping:
            run.save(validation_loss)
        if is_stopping:
            return run.finish(ExitCode.STOPPED)
        run.timer.resume()
    # The last step is always validated, by this process or, if that was stopped, by the next one.
    is_finite = validation_loss is not None and math.isfinite(validation_loss)
    return run.finish(ExitCode.FINISHED if is_finite else ExitCode.DIVERGED)


class Run:
    """A training run: its state, and everything that is done with it after a step.

    Attributes:
      step: number of completed steps.
      state: the state after `step` steps.
      is_validation_missing: an earlier process was interrupted before it validated this state.
      has_diverged: too many steps in a row were not finite.
      timer: measures the duration of steps.
    """

    def __init__(self, started: StartedRun, stop: StopRequest) -> None:
        """Opens the logs and the data stream.

        Args:
          started: the run from `startup.start_run`.
          stop: a request to stop, which interrupts validation.
        """
        context = started.context
        self.step = started.step
        self.state = started.state
        self.is_validation_missing = started.is_validation_missing
        self.has_diverged = False
        self._context = context
        self._config = context.config
        self._options = context.config.training
        self._stop = stop
        self._unreported: tuple[int, Metrics] | None = None
        self._logs = _open_logs(context.workdir, self.step)
        self._progress_bar = console.open_progress_bar(self.step, self._options.steps)
        self._batches = batching.train_batches(
            context.data,
            context.config,
            self._batch_number(self.step),
            sharding.local_rows(self.mesh, self._options.batch_size),
        )
        self.timer = StepTimer(self.step)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The device mesh."""
        return self._context.setup.mesh

    @property
    def is_complete(self) -> bool:
        """True after the last step."""
        return self.step >= self._options.steps

    @property
    def is_validation_due(self) -> bool:
        """True if the current step is to be validated."""
        return validation_schedule.is_validation_step(self.step, self._options)

    @property
    def is_checkpoint_due(self) -> bool:
        """True if the current step is to be saved."""
        return self.is_complete or self.step % self._options.checkpoint_every == 0

    # ---- training ----------------------------------------------------------------------------

    def train_step(self) -> None:
        """Starts one training step, then reports the step before it.

        Reading the results of a step waits for it. Doing so only when the next step is under way
        never leaves the devices idle.
        """
        watchdog.reset(self._config.advanced.hang_minutes)
        rows = self.timer.next_item(self._batches)
        batch = sharding.shard_batch(self.mesh, rows, self._options.batch_size)
        results = self._execute_step(batch)
        self.step += 1
        self.report()
        self._unreported = (self.step, results)
        self._context.checkpoints.poll()

    def _execute_step(self, batch: Batch) -> Metrics:
        compiled_step = self._context.compiled_step.execute
        replay_every = self._config.advanced.replay_check
        if not replay_every or (self.step + 1) % replay_every != 0:
            self.state, results = compiled_step(self.state, batch)
            return results
        self.state, results, is_same = replay_check.run_twice(compiled_step, self.state, batch)
        if not is_same:
            raise RunError(
                f"step {self.step + 1} gave other bits when run again: faulty hardware, or an "
                "operation that is not deterministic; checkpoints hold earlier steps. Try other "
                "devices"
            )
        return results

    def report(self) -> None:
        """Waits for the last step that has not been reported, if any, and logs it if due."""
        if self._unreported is None:
            return
        step, results = self._unreported
        self._unreported = None
        if results.fault:
            self._log_fault(step, results)
        self.has_diverged = (
            int(results.nonfinite_in_a_row) >= self._config.advanced.max_nonfinite_steps
        )
        is_last = step == self._options.steps
        if step % self._options.log_every == 0 or is_last or self.has_diverged:
            self._log_metrics(step, jax.device_get(results))
        self._progress_bar.update()

    def _log_fault(self, step: int, results: Metrics) -> None:
        """Logs a step that made no update, with the data records of its batch."""
        records = batching.record_ids(
            self._context.data, self._config, self._batch_number(step - 1)
        )
        event = {
            "step": step,
            "fault": train_step.FAULTS[int(results.fault)],
            "loss": str(results.loss),
            "grad_norm": str(results.grad_norm),
            "records": records,
        }
        self._logs.event(event)
        console.log(
            f"step {step} changed nothing: {event['fault']}, loss {event['loss']}, "
            f"grad {event['grad_norm']}, records {records}"
        )

    def _log_metrics(self, step: int, results: Metrics) -> None:
        interval = self.timer.restart(step)
        data = self._context.data
        batches = restore.batches_read(step, self._context.metadata["skipped_data"])
        row = metrics.train_row(
            self._config,
            step,
            results,
            interval.seconds_per_step,
            data.training_bytes_per_token,
            self._context.peak_flops,
        )
        row["data_wait"] = interval.data_wait
        row["epochs"] = batching.epochs(data, self._config, batches)
        if len(data.datasets) > 1:
            row["tokens_by_source"] = batching.tokens_by_dataset(data, self._config, batches)
        layers = metrics.routing_by_layer(
            results.statistics,
            self._config.widths,
            self._config.pools,
            self._context.setup.placement,
        )
        self._logs.write(row, layers)
        console.log(metrics.console_line(row, layers, self._options.steps))

    def _batch_number(self, step: int) -> int:
        return restore.next_batch_number(step, self._context.metadata["skipped_data"])

    # ---- validation --------------------------------------------------------------------------

    def validate(self) -> float | None:
        """Computes and logs the losses of the validation split and of the validation sets.

        Returns:
          The loss of the validation split in nats per token. None if a signal arrived meanwhile;
          then nothing is logged, and the next start of this run validates.
        """
        try:
            scored = self._score(self._context.data.datasets)
            scored_sets = self._score(self._context.data.validation_sets)
        except Stopped:
            return None
        result, statistics = validation.together(scored)
        has_capacity = self._config.evaluation.capacity_factor > 0
        result |= validation.summarize_sets(scored_sets, has_capacity)
        if has_capacity:
            result["dropped"] = metrics.count_dropped(statistics)
        layers = metrics.routing_by_layer(
            statistics, self._config.widths, self._config.pools, self._context.setup.placement
        )
        self._logs.write({"step": self.step, "split": "validation", **result}, layers)
        console.log(metrics.validation_line(self.step, self._options.steps, result))
        return result["loss"]

    def _score(self, datasets: tuple[prepared_data.Dataset, ...]) -> dict[str, validation.Scored]:
        """Scores the validation split of every dataset. Raises Stopped after a signal."""
        return {
            dataset.name: validation.run(
                self._context.score_step,
                self.state.variables,
                self._validation_batches(dataset),
                dataset,
                whole=True,
            )
            for dataset in datasets
        }

    def _validation_batches(self, dataset: prepared_data.Dataset) -> Iterator[dict[str, jax.Array]]:
        """Yields the sharded validation batches of a dataset. Raises Stopped after a signal."""
        size = self._config.evaluation.batch_size
        batches: Iterator[dict[str, np.ndarray]] = batching.validation_batches(
            dataset,
            size,
            self._config.model.vocab_size,
            rows=sharding.local_rows(self.mesh, size),
        )
        for batch in batches:
            watchdog.reset(self._config.advanced.hang_minutes)
            # Several processes must score the same number of batches, so none of them stops here.
            if self._stop.requested and not processes.is_multi_process():
                raise Stopped
            yield sharding.shard_batch(self.mesh, batch, size)

    # ---- saving and the end ------------------------------------------------------------------

    def save(self, validation_loss: float | None) -> None:
        """Starts to save a checkpoint of the current step.

        Args:
          validation_loss: that of the current step; None if it was not validated.
        """
        if validation_loss is not None and not math.isfinite(validation_loss):
            validation_loss = None  # so that this step is not kept as the best
        metadata = {**self._context.metadata, "validation_loss": validation_loss}
        self._context.checkpoints.save(self.state, metadata)

    def finish(self, code: ExitCode) -> ExitCode:
        """Completes the last save, closes the logs and prints how the run ended. Returns `code`."""
        self._progress_bar.close()
        self._context.checkpoints.close()
        self._logs.close()
        file = sys.stderr if code == ExitCode.DIVERGED else sys.stdout
        console.log(self._final_message(code), file=file)
        return code

    def _final_message(self, code: ExitCode) -> str:
        if code == ExitCode.FINISHED:
            duration = metrics.duration(time.monotonic() - self._context.started_at)
            return f"finished step {self.step} in {duration}: {self._context.workdir}"
        saved_step = max(self._context.checkpoints.steps(), default=0)
        if code == ExitCode.STOPPED:
            return (
                f"stopped at step {self.step}, saved step {saved_step}; run the same command to "
                "go on"
            )
        if not self.has_diverged:
            return validation_schedule.describe_nonfinite(self.step, self._context.workdir)
        return (
            f"diverged: {self._config.advanced.max_nonfinite_steps} steps in a row were not "
            f"finite, up to step {self.step}; the last good checkpoint is step {saved_step}. Lower "
            "optimizer.learning_rate, or look at the records in events.jsonl and skip them with "
            "training.rewind"
        )


def _open_logs(workdir: pathlib.Path, step: int) -> run_logs.RunLogWriter | run_logs.NullWriter:
    """Opens the logs on the main process.

    Raises:
      RunError: the disk is full, or the logs cannot be written.
    """
    if not processes.is_main_process():
        return run_logs.NullWriter()
    try:
        return run_logs.RunLogWriter(workdir, step)
    except OSError as error:
        raise run_logs.write_error_class(error)(
            f"cannot write the logs of {workdir}: {error.strerror}; make room and run the same "
            "command again"
        ) from None
