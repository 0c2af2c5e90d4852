"""The training run, read top to bottom."""

import base64
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time

import jax
import tqdm

from modse_jax.config import device_mesh
from modse_jax.config.loading import (
    RESUMABLE,
    RESUMABLE_ANY_MESH,
    differences,
    from_saved,
    to_flat_dict,
)
from modse_jax.config.options import Config
from modse_jax.data import batching, data_card, tokenizers, training_data
from modse_jax.errors import ExitCode, RunError, UserError
from modse_jax.model import accounting, kernel_selection
from modse_jax.moe import expert_placement
from modse_jax.runtime import files, memory_usage, processes, sharding, watchdog
from modse_jax.runtime.lock import Lock
from modse_jax.runtime.signals import Stopped, StopRequest
from modse_jax.training import metrics, run_logs, train_step, validation
from modse_jax.training.checkpointing import Checkpoints, Found

# What a run that was killed early may leave before it writes config.json, which says that the workdir holds a run.
BEFORE_CONFIG = {
    "data",
    "data.partial",
    "data.preparing",
    "checkpoints",
    "environment.json",
    "environment.json.tmp",
    "config.json.tmp",
}


def train(config: Config, workdir: str) -> ExitCode:
    """Trains until training.steps, or resumes; returns the exit code. Raises UserError before anything is written, and
    RunError where a run that had begun cannot go on."""
    workdir = pathlib.Path(workdir).expanduser().absolute()
    stop, locks = StopRequest(), contextlib.ExitStack()
    try:
        with locks:
            return _train(config, workdir, stop, locks)
    except Stopped:
        print(
            "stopped before the first step; nothing is lost: run the same command to go on",
            file=sys.stderr,
        )
        processes.exit_now(ExitCode.STOPPED)
        return ExitCode.STOPPED
    finally:
        watchdog.cancel()


def _train(config, workdir, stop, locks):
    t, started = config.training, time.monotonic()

    # ---- checks: nothing is written before all of them pass, on every process ----------------------------------------
    mesh, placement, abstract, kernels = processes.on_all_processes(
        lambda: _checked(config, workdir)
    )
    processes.assert_same(
        {
            **{name: repr(value) for name, value in to_flat_dict(config).items()},
            "--workdir": str(workdir),
            "the code of modse_jax": processes.source_digest(),
        }
    )
    say = _say if processes.is_main_process() else _silent
    processes.on_all_processes(
        lambda: _lock(workdir, locks) if processes.is_main_process() else None
    )

    # ---- data -------------------------------------------------------------------------------------------------------
    data = processes.on_all_processes(lambda: training_data.load(config, workdir), first_alone=True)
    processes.assert_same({"the data": data.fingerprint})
    for dataset in data.datasets:
        say(data_card.summarize_card(dataset.card))

    # ---- state: of the newest sound checkpoint, or a fresh one -------------------------------------------------------
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        config.checkpoint.keep,
        config.checkpoint.keep_every,
        order=expert_placement.hidden_unit_order(config.widths, placement),
    )
    locks.callback(checkpoints.settle)
    meta = {
        "config": dataclasses.asdict(config),
        "data": data.fingerprint,
        "tokenizer": tokenizers.fingerprint(data.tokenizer),
        "tokenizer_model": _text(data.tokenizer.serialize()),
        "cards": [dataset.card for dataset in data.datasets],
        "code": processes.source_digest(),
        "devices": mesh.size,
        "skipped_data": [],
        "validation_loss": None,
    }
    latest, state, damaged, rewind_to = _restored(checkpoints, abstract, meta, t.rewind)
    finished = latest >= t.steps

    # ---- compile ----------------------------------------------------------------------------------------------------
    if not finished:
        compile_start = time.monotonic()
        compiled_step = train_step.compile_train_step(config, mesh)
        seconds = time.monotonic() - compile_start
        processes.on_all_processes(lambda: _check_memory(compiled_step, mesh))
    score = train_step.jitted_score_step(config, mesh)
    peak = accounting.peak_flops(mesh.devices.flat)

    # ---- workdir: from here on the run writes ------------------------------------------------------------------------
    for line in checkpoints.start_writing(damaged, rewind_to):
        say(line)
    validated = processes.broadcast_from_main(lambda: _validated(workdir, latest, t))
    if finished and validated:
        say(f"finished: {workdir} holds step {latest} of {t.steps}; nothing to do")
        checkpoints.close()
        return ExitCode.FINISHED
    if processes.is_main_process():
        _write_json(workdir / "environment.json", _environment())
        _write_json(workdir / "config.json", dataclasses.asdict(config))
    if latest:
        say(f"resuming step {latest} of {t.steps} from {workdir / 'checkpoints'}")
    else:
        say(f"starting at step 0 in an empty workdir, {workdir}")
        state = train_step.init_sharded_state(config, mesh)
    if not finished:
        say(parameter_table(config))
        say(kernels.line())
        say(memory_line(compiled_step, abstract, seconds))
    processes.wait_for_all()

    # ---- loop -------------------------------------------------------------------------------------------------------
    writer = _writer(workdir, latest)
    bar = tqdm.tqdm(
        total=t.steps,
        initial=latest,
        unit="step",
        disable=None if processes.is_main_process() else True,
        dynamic_ncols=True,
    )
    batches = batching.train_batches(
        data, config, _batch_number(latest, meta), sharding.local_rows(mesh, t.batch_size)
    )
    step, pending, code = latest, None, ExitCode.FINISHED
    interval_start, interval_first, waited = time.perf_counter(), latest, 0.0

    def read(step, values):
        """Waits for a step; logs it where due; True where the run has diverged."""
        nonlocal interval_start, interval_first, waited
        if values.fault:
            event = {
                "step": step,
                "fault": train_step.FAULTS[int(values.fault)],
                "loss": str(values.loss),
                "grad_norm": str(values.grad_norm),
                "records": batching.record_ids(data, config, _batch_number(step - 1, meta)),
            }
            writer.event(event)
            say(
                f"step {step} changed nothing: {event['fault']}, loss {event['loss']}, grad {event['grad_norm']}, "
                f"records {event['records']}"
            )
        diverged = int(values.nonfinite_in_a_row) >= t.max_nonfinite_steps
        if step % t.log_every == 0 or step == t.steps or diverged:
            values = jax.device_get(values)
            now, taken = time.perf_counter(), _batch_number(step, meta)
            seconds, share_waited = (
                (now - interval_start) / (step - interval_first),
                waited / (now - interval_start),
            )
            interval_start, interval_first, waited = now, step, 0.0
            row = metrics.train_row(
                config, step, values, seconds, data.training_bytes_per_token, peak
            )
            row |= {"data_wait": share_waited, "epochs": batching.epochs(data, config, taken)}
            if len(data.datasets) > 1:
                row["tokens_by_source"] = batching.tokens_by_dataset(data, config, taken)
            layers = metrics.routing_by_layer(values.statistics, config.widths, placement)
            writer.write(row, layers)
            say(metrics.console_line(row, layers, t.steps))
        bar.update()
        return diverged

    def validate():
        """Held-out loss, logged; None where a signal came meanwhile: the next start makes up for it."""
        size, scored = config.evaluation.batch_size, {}
        try:
            for dataset in data.datasets:
                held = _until_asked(
                    stop,
                    t.hang_minutes,
                    batching.validation_batches(
                        dataset, size, config.model.vocab_size, rows=sharding.local_rows(mesh, size)
                    ),
                )
                placed = (sharding.shard_batch(mesh, b, size) for b in held)
                scored[dataset.name] = validation.run(
                    score, state.params, placed, dataset, whole=True
                )
        except Stopped:
            return None
        result, routing = validation.together(scored)
        writer.write(
            {"step": step, "split": "validation", **result},
            metrics.routing_by_layer(routing, config.widths, placement),
        )
        say(
            f"step {step}/{t.steps}  validation loss {result['loss']:.4f}  {result['bits_per_byte']:.4f} bits/byte"
        )
        return result["loss"]

    stop.enter_loop(mesh)
    if not validated and validate() is None:
        code = ExitCode.STOPPED
    while step < t.steps and code == ExitCode.FINISHED:
        watchdog.reset(t.hang_minutes)
        begin = time.perf_counter()
        rows = next(batches)
        waited += time.perf_counter() - begin
        batch = sharding.shard_batch(mesh, rows, t.batch_size)
        if t.replay_check and (step + 1) % t.replay_check == 0:
            state, values, same = train_step.run_twice(compiled_step, state, batch)
            if not same:
                raise RunError(
                    f"step {step + 1} gave other bits when run again: faulty hardware, or an operation that "
                    "is not deterministic; checkpoints hold earlier steps. Try other devices"
                )
        else:
            state, values = compiled_step(state, batch)
        step += 1

        # Step n is read once step n + 1 is under way, so that reading never leaves the device idle.
        diverged = pending is not None and read(*pending)
        pending = (step, values)
        checkpoints.poll()
        last, stopping = (
            step == t.steps,
            stop.requested_anywhere(),
        )  # once: a signal may come at any line
        save = last or stopping or step % t.checkpoint_every == 0
        if not diverged and (_due(step, t) or save):
            diverged = read(*pending)
            pending = None
        if diverged:
            code = ExitCode.DIVERGED
            break

        pause = time.perf_counter()
        validation_loss = validate() if _due(step, t) and not stopping else None
        stopping = stopping or (_due(step, t) and validation_loss is None)
        if save or stopping:
            checkpoints.save(state, {**meta, "validation_loss": validation_loss})
        if stopping:
            code = ExitCode.STOPPED
            break
        interval_start += time.perf_counter() - pause

    # ---- end --------------------------------------------------------------------------------------------------------
    bar.close()
    checkpoints.close()
    writer.close()
    saved = max(checkpoints.steps(), default=0)
    say(
        {
            ExitCode.FINISHED: f"finished step {step} in {metrics.duration(time.monotonic() - started)}: {workdir}",
            ExitCode.STOPPED: f"stopped at step {step}, saved step {saved}; run the same command to go on",
            ExitCode.DIVERGED: f"diverged: {t.max_nonfinite_steps} steps in a row were not finite, up to step {step}; the last "
            f"good checkpoint is step {saved}. Lower optimizer.learning_rate, or look at the records in "
            "events.jsonl and skip them with training.rewind",
        }[code],
        file=sys.stderr if code == ExitCode.DIVERGED else sys.stdout,
    )
    return code


def _lock(workdir, locks):
    """This process as the only writer of the workdir, until `locks` closes; without a trace where it closes on bad
    input."""
    lock = Lock(workdir / "checkpoints" / ".lock", f"{workdir} is in use")
    locks.push(
        lambda kind, *_: lock.release(
            leave_no_trace=kind is not None and issubclass(kind, UserError)
        )
    )


def _restored(checkpoints, abstract, meta, rewind):
    """(step, state, damaged steps, step rewound to or 0) of the newest sound checkpoint, or of the one that
    training.rewind names; step 0 and no state where there is none. meta: gets the ranges of data to skip."""
    found = checkpoints.newest(functools.partial(_check_meta, meta))
    damaged, rewind_to = found.damaged, 0
    if rewind and list(rewind) not in found.meta.get("skipped_data", []):
        rewind_to = rewind[0]
        if rewind_to not in checkpoints.steps():
            raise UserError(
                f"training.rewind={rewind}: step {rewind_to} is not saved; saved: "
                f"{', '.join(map(str, checkpoints.steps())) or 'none'}"
            )
        if reason := processes.broadcast_from_main(lambda: checkpoints.verify(rewind_to)):
            raise UserError(
                f"training.rewind={rewind}: checkpoint {rewind_to} is damaged: {reason}"
            )
        found = Found(rewind_to, checkpoints.meta(rewind_to), [])
        damaged = [d for d in damaged if d[0] < rewind_to]
    while found.step:
        state, reason = checkpoints.restore(found.step, abstract)
        if not reason:
            meta["skipped_data"] = found.meta["skipped_data"] + (
                [list(rewind)] if rewind_to else []
            )
            return found.step, state, damaged, rewind_to
        damaged.append([found.step, reason])
        found = checkpoints.newest(functools.partial(_check_meta, meta), before=found.step)
        damaged += found.damaged
    return 0, None, damaged, 0


def _check_meta(meta, step, saved):
    """Raises UserError where a step was trained on other data, or with another tokenizer, than `meta` says."""
    for name in ("tokenizer", "data"):
        if saved[name] != meta[name]:
            raise UserError(
                f"checkpoint {step} was trained with other data ({name} {saved[name]!r}), now "
                f"{meta[name]!r}; restore the data it was trained on, or use another --workdir"
            )


def _batch_number(step, meta):
    """Which batch of data the step after `step` takes: ranges that a rewind skipped lie between."""
    return step + sum(count for first, count in meta["skipped_data"] if step >= first)


def _writer(workdir, latest):
    if not processes.is_main_process():
        return run_logs.NullWriter()
    try:
        return run_logs.RunLogWriter(workdir, latest)
    except OSError as error:
        raise RunError(
            f"cannot write the logs of {workdir}: {error.strerror}; make room and run the same command "
            "again"
        ) from None


def _text(model):
    return base64.b64encode(model).decode()


def _due(step, t):
    return step == t.steps or bool(t.eval_every and step % t.eval_every == 0)


def _validated(workdir, step, t):
    """Whether no validation of that step is due and missing: a signal may have come in the middle of it."""
    path = workdir / "metrics.jsonl"
    rows = run_logs.read_log(path) if path.exists() else []
    return (
        not step
        or not _due(step, t)
        or any(r["step"] == step and r["split"] == "validation" for r in rows)
    )


def _until_asked(stop, hang_minutes, batches):
    for batch in batches:
        watchdog.reset(hang_minutes)
        if (
            stop.requested and not processes.is_multi_process()
        ):  # several must end after the same batch
            raise Stopped
        yield batch


def _check_memory(compiled, mesh):
    needed, device = memory_usage.peak_bytes(compiled), mesh.devices.flat[0]
    if needed is None:
        return
    if device.platform == "cpu":  # the devices of a process share one memory
        needed *= len(mesh.local_devices)
        room = memory_usage.host_memory_bytes()
    else:
        room = (device.memory_stats() or {}).get("bytes_limit", needed)
    if needed > room:
        raise UserError(
            f"a step needs about {needed / 2**30:.1f} GiB on {device.device_kind}, which has "
            f"{room / 2**30:.1f}; lower training.batch_size or raise training.gradient_accumulation, set "
            "model.remat=full, or share parameters with mesh.fsdp"
        )


def _checked(config, workdir):
    """(mesh, placement, abstract state, kernels), after every check that can be made before data is read."""
    mesh = device_mesh.build_mesh(config)
    placement = device_mesh.place_experts_on_mesh(config, mesh)
    kernels = kernel_selection.check_kernels(config, mesh)
    evaluation = kernel_selection.for_evaluation(config)
    if (evaluation.moe.backend, evaluation.model.attention) != (
        config.moe.backend,
        config.model.attention,
    ):
        kernel_selection.check_kernels(evaluation, mesh)  # validation takes others than training
    _check_workdir(workdir, config)
    training_data.check_source(config, workdir)
    abstract = train_step.state_shapes(config, mesh)
    _check_space(workdir, abstract, config)
    return mesh, placement, abstract, kernels


def _say(text, file=None):
    tqdm.tqdm.write(text, file=file)  # above the bar, where there is one


def _silent(text, file=None):
    pass


def parameter_table(config: Config) -> str:
    p = accounting.parameters(config)
    lines = [f"  {name:12} {count:>15,}" for name, count in p._asdict().items()]
    return "\n".join(
        [
            "parameters",
            *lines,
            f"  {'total':12} {p.total:>15,}",
            f"  {'active':12} {accounting.active_parameters(config):>15,}  at equal load; widths "
            f"{', '.join(map(str, config.widths[:16]))}{' ...' if len(config.widths) > 16 else ''}",
        ]
    )


def memory_line(compiled, abstract, seconds: float) -> str:
    state = sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(abstract)
    )
    peak = memory_usage.peak_bytes(compiled) or state
    return (
        f"memory per device: state {state / 2**20:,.0f} MiB, at most about {peak / 2**20:,.0f} MiB in a step; "
        f"compiled in {seconds:.0f} s"
    )


def _check_workdir(workdir, config):
    """A workdir is new, empty, or holds this config but for what may change on resuming."""
    saved = workdir / "config.json"
    if saved.exists():
        try:
            old = from_saved(json.loads(saved.read_text()))
        except (ValueError, UserError) as error:
            raise UserError(
                f"{saved} is not a config of this version ({error}); use another --workdir"
            ) from None
        by_device = config.moe.capacity_factor or config.moe.balance_loss_scope == "device"
        free = RESUMABLE if by_device else RESUMABLE + RESUMABLE_ANY_MESH
        changed = [line for line in differences(old, config) if line.split(":")[0] not in free]
        if changed:
            raise UserError(
                f"{workdir} holds another config ({'; '.join(changed)}); use another --workdir, or the "
                f"config it was started with"
            )
    elif workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a directory")
    elif any((workdir / "checkpoints").glob("[0-9]*")) or any(
        (workdir / "checkpoints" / "quarantine").glob("*")
    ):
        raise UserError(
            f"{workdir} holds checkpoints but no config.json to compare with; each step's meta holds its "
            f"config: restore the file, or use another --workdir"
        )
    elif workdir.exists() and any(p.name not in BEFORE_CONFIG for p in workdir.iterdir()):
        raise UserError(
            f"--workdir={workdir} is not empty and holds no run (no config.json); name another directory"
        )
    parent = next(p for p in (workdir, *workdir.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(
            f"--workdir={workdir} cannot be made: {parent} is not a directory that may be written"
        )


def _check_space(workdir, abstract, config):
    state = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(abstract))
    needed = (config.checkpoint.keep + 1) * state
    parent = next(p for p in (workdir, *workdir.parents) if p.exists())
    held = 0  # by steps that new ones will replace
    for file in (workdir / "checkpoints").glob("[0-9]*/**/*"):
        with contextlib.suppress(FileNotFoundError):  # of a run that is at work: the lock will tell
            held += file.stat().st_size
    free = shutil.disk_usage(parent).free
    if free + held < needed:
        raise UserError(
            f"--workdir={workdir} has {free / 2**20:,.0f} MiB free, but {config.checkpoint.keep + 1} "
            f"checkpoints of {state / 2**20:,.0f} MiB need {needed / 2**20:,.0f} MiB; free some space, "
            f"lower checkpoint.keep, or use another --workdir"
        )


def _write_json(path, value):
    files.write_atomically(path, json.dumps(value, indent=2) + "\n")


def _environment():
    def git(*args):
        try:
            return subprocess.run(
                ["git", *args],
                capture_output=True,
                text=True,
                check=True,
                cwd=pathlib.Path(__file__).parent,
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    packages = (
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "tensorflow-datasets",
        "numpy",
    )
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()],
        "git_commit": git("rev-parse", "HEAD"),
        "git_changes": git("status", "--porcelain").splitlines(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
