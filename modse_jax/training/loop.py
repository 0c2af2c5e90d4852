"""The training run, read top to bottom."""
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import time

import jax
import tqdm

from modse_jax import mesh as meshes
from modse_jax import processes
from modse_jax.config import RESUMABLE, RESUMABLE_ANY_MESH, Config, UserError, differences, from_dict, to_flat_dict
from modse_jax.data import loader, prepare
from modse_jax.model import accounting, attention
from modse_jax.moe import expert_ffn, sizing
from modse_jax.training import metrics, validation
from modse_jax.training import step as steps
from modse_jax.training.checkpoints import Checkpoints

# What a run that was killed early may leave before it writes config.json, which says that the workdir holds a run.
BEFORE_CONFIG = {"data", "data.partial", "checkpoints", "environment.json", "environment.tmp", "config.tmp"}
FINISHED, DIVERGED, STOPPED, KILLED = 0, 3, 75, 130    # exit codes


def train(config: Config, workdir: str) -> int:
    """Trains until training.steps, or resumes; returns the exit code. Raises UserError before anything is written."""
    workdir = pathlib.Path(workdir).expanduser().absolute()
    t, started = config.training, time.monotonic()

    # ---- checks: nothing is written before all of them pass, on every process ----------------------------------------
    mesh, placement, abstract = processes.together(lambda: _checked(config, workdir))
    processes.agree({**{name: repr(value) for name, value in to_flat_dict(config).items()}, "--workdir": str(workdir),
                     "the code of modse_jax": processes.source_digest()})
    say = _say if processes.first() else _silent

    # ---- data -------------------------------------------------------------------------------------------------------
    data = processes.together(lambda: loader.load(config, workdir), first_alone=True)
    processes.agree({"the data": json.dumps(data.card)})
    say(prepare.summary(data.card))

    # ---- workdir ----------------------------------------------------------------------------------------------------
    (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep,
                              order=sizing.column_order(config.widths, placement))
    meta = {"config": dataclasses.asdict(config), "data": data.card, "tokenizer": data.card["tokenizer"]}

    # ---- state: a checkpoint's, or a fresh one ----------------------------------------------------------------------
    latest = max(checkpoints.steps(), default=0)
    if latest:
        processes.together(lambda: checkpoints.check_meta(latest, meta))
    if latest >= t.steps:
        say(f"finished: {workdir} holds step {latest} of {t.steps}; nothing to do")
        checkpoints.close()
        return FINISHED
    if processes.first():
        _write_json(workdir / "environment.json", _environment())
        _write_json(workdir / "config.json", dataclasses.asdict(config))
    if latest:
        say(f"resuming step {latest} of {t.steps} from {workdir / 'checkpoints'}")
        state = checkpoints.restore(latest, abstract)
    else:
        say(f"starting at step 0 in {workdir}")
        state = steps.first_state(config, mesh)

    # ---- compile ----------------------------------------------------------------------------------------------------
    compile_start = time.monotonic()
    train_step = steps.lower(config, mesh).compile()
    score = jax.jit(steps.make_score_step(config, mesh), out_shardings=meshes.replicated(mesh))
    say(parameter_table(config))
    say(memory_line(train_step, abstract, time.monotonic() - compile_start))
    processes.wait()
    peak = accounting.peak_flops(mesh.devices.flat[0])
    peak = peak and peak * mesh.size

    # ---- loop -------------------------------------------------------------------------------------------------------
    writer, stop = metrics.Writer(workdir, latest) if processes.first() else metrics.NoWriter(), _StopFlag(mesh)
    bar = tqdm.tqdm(total=t.steps, initial=latest, unit="step", disable=None if processes.first() else True,
                    dynamic_ncols=True)
    batches = loader.train_batches(data, config, latest, meshes.local_rows(mesh, t.batch_size))
    held = config.evaluation.batch_size
    step, pending, code = latest, None, FINISHED
    interval_start, interval_first = time.perf_counter(), latest

    def read(step, values):
        """Waits for a step; logs it where due; True where the run has diverged."""
        nonlocal interval_start, interval_first
        diverged = int(values.skipped_in_a_row) >= t.max_nonfinite_steps
        if step % t.log_every == 0 or step == t.steps or diverged:
            values = jax.device_get(values)
            seconds = (time.perf_counter() - interval_start) / (step - interval_first)
            interval_start, interval_first = time.perf_counter(), step
            row = metrics.train_row(config, step, values, seconds, data.bytes_per_token("train"), peak)
            layers = metrics.routing_by_layer(values.statistics, config.widths, placement)
            writer.write(row, layers)
            say(metrics.console_line(row, layers, t.steps))
        bar.update()
        return diverged

    while step < t.steps:
        batch = meshes.place(mesh, next(batches), t.batch_size)
        state, values = train_step(state, batch)
        step += 1

        # Step n is read once step n + 1 is under way, so that reading never leaves the device idle.
        diverged = pending is not None and read(*pending)
        pending = (step, values)
        last, stopping = step == t.steps, stop.agreed()    # once: a signal may come at any line
        validate = last or (t.eval_every and step % t.eval_every == 0 and not stopping)
        save = last or stopping or step % t.checkpoint_every == 0
        if not diverged and (validate or save):
            diverged = read(*pending)
            pending = None
        if diverged:
            code = DIVERGED
            break

        pause = time.perf_counter()
        if validate:
            batches_held = loader.validation_batches(data, held, config.model.vocab_size,
                                                     rows=meshes.local_rows(mesh, held))
            result, routing = validation.run(score, state.params, (meshes.place(mesh, b, held) for b in batches_held),
                                             data, whole=True)
            writer.write({"step": step, "split": "validation", **result},
                         metrics.routing_by_layer(routing, config.widths, placement))
            say(f"step {step}/{t.steps}  validation loss {result['loss']:.4f}  "
                f"{result['bits_per_byte']:.4f} bits/byte")
        if save:
            checkpoints.save(state, meta)
        if stopping and not last:
            code = STOPPED
            break
        interval_start += time.perf_counter() - pause

    # ---- end --------------------------------------------------------------------------------------------------------
    bar.close()
    checkpoints.close()
    writer.close()
    saved = max(_disk_steps(workdir), default=0)
    say({FINISHED: f"finished step {step} in {metrics.duration(time.monotonic() - started)}: {workdir}",
         STOPPED: f"stopped at step {step}, saved step {saved}; run the same command to go on",
         DIVERGED: f"diverged: {t.max_nonfinite_steps} non-finite steps in a row up to step {step}; the last good "
                   f"checkpoint is step {saved}. Lower optimizer.learning_rate or look at the data"}[code],
        file=sys.stderr if code == DIVERGED else sys.stdout)
    return code


def _checked(config, workdir):
    """(mesh, placement, abstract state), after every check that can be made before data is read."""
    mesh = meshes.build(config)
    placement = meshes.placement(config, mesh)
    _check_backend(config, placement, mesh)
    _check_workdir(workdir, config)
    loader.check_source(config, workdir)
    abstract = steps.abstract_state(config, mesh)
    _check_space(workdir, abstract, config)
    return mesh, placement, abstract


def _say(text, file=None):
    tqdm.tqdm.write(text, file=file)    # above the bar, where there is one


def _silent(text, file=None):
    pass


class _StopFlag:
    """Set by SIGTERM or Ctrl-C; the second one leaves at once, which the atomic commit of a checkpoint allows."""

    def __init__(self, mesh):
        self.asked, self._mesh, self._sent = False, mesh, None
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._handle)

    def agreed(self) -> bool:
        """Whether any process has been asked to stop: the same answer on all. Where there are several, it is that of
        the call before, so that no device waits for it."""
        if not processes.several():
            return self.asked
        before, self._sent = self._sent, processes.any_of(self.asked, self._mesh)
        return before is not None and bool(before)

    def _handle(self, number, frame):
        if self.asked:
            os._exit(KILLED)
        self.asked = True
        os.write(2, b"\nstopping after this step; once more to leave at once\n")    # print may be half-way itself


def parameter_table(config: Config) -> str:
    p = accounting.parameters(config)
    lines = [f"  {name:12} {count:>15,}" for name, count in p._asdict().items()]
    return "\n".join(["parameters", *lines, f"  {'total':12} {p.total:>15,}",
                      f"  {'active':12} {accounting.active_parameters(config):>15,}  at equal load; widths "
                      f"{', '.join(map(str, config.widths[:16]))}{' ...' if len(config.widths) > 16 else ''}"])


def memory_line(compiled, abstract, seconds: float) -> str:
    state = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(abstract))
    analysis = compiled.memory_analysis()
    peak = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes if analysis else state
    return (f"memory per device: state {state / 2**20:,.0f} MiB, at most about {peak / 2**20:,.0f} MiB in a step; "
            f"compiled in {seconds:.0f} s")


def _disk_steps(workdir):
    return [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]


def _check_backend(config, placement, mesh):
    backend, dim, chip = config.moe.backend, config.model.dim, meshes.chip(mesh)
    try:
        expert_ffn.check_backend(backend, placement, dim, chip)
    except ValueError as error:
        raise UserError(str(error)) from None
    heads = config.model.num_heads
    attention.chosen(config.model.attention, (1, config.data.sequence_length, heads, dim // heads), chip)
    if expert_ffn.chosen(backend, placement, (0, dim), chip) == "pallas_tpu":
        expert_ffn.check_kernels(placement, dim, chip)


def _check_workdir(workdir, config):
    """A workdir is new, empty, or holds this config but for what may change on resuming."""
    saved = workdir / "config.json"
    if saved.exists():
        try:
            old = from_dict(json.loads(saved.read_text()))
        except (ValueError, UserError) as error:
            raise UserError(f"{saved} is not a config of this version ({error}); use another --workdir") from None
        by_device = config.moe.capacity_factor or config.moe.balance_loss_scope == "device"
        free = RESUMABLE if by_device else RESUMABLE + RESUMABLE_ANY_MESH
        changed = [line for line in differences(old, config) if line.split(":")[0] not in free]
        if changed:
            raise UserError(f"{workdir} holds another config ({'; '.join(changed)}); use another --workdir, or the "
                            f"config it was started with")
    elif workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a directory")
    elif any((workdir / "checkpoints").glob("[0-9]*")):
        raise UserError(f"{workdir} holds checkpoints but no config.json to compare with; each step's meta holds its "
                        f"config: restore the file, or use another --workdir")
    elif workdir.exists() and any(p.name not in BEFORE_CONFIG for p in workdir.iterdir()):
        raise UserError(f"--workdir={workdir} is not empty and holds no run (no config.json); name another directory")
    parent = next(p for p in (workdir, *workdir.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--workdir={workdir} cannot be made: {parent} is not a directory that may be written")


def _check_space(workdir, abstract, config):
    state = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(abstract))
    needed = (config.checkpoint.keep + 1) * state
    parent = next(p for p in (workdir, *workdir.parents) if p.exists())
    held = sum(f.stat().st_size for f in (workdir / "checkpoints").rglob("*") if f.is_file())
    free = shutil.disk_usage(parent).free
    if free + held < needed:
        raise UserError(f"--workdir={workdir} has {free / 2**20:,.0f} MiB free, but {config.checkpoint.keep + 1} "
                        f"checkpoints of {state / 2**20:,.0f} MiB need {needed / 2**20:,.0f} MiB; free some space, "
                        f"lower checkpoint.keep, or use another --workdir")


def _write_json(path, value):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def _environment():
    def git(*args):
        try:
            return subprocess.run(["git", *args], capture_output=True, text=True, check=True,
                                  cwd=pathlib.Path(__file__).parent).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")
    return {"command": sys.argv, "python": platform.python_version(), "platform": platform.platform(),
            "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()], "git_commit": git("rev-parse", "HEAD"),
            "git_changes": git("status", "--porcelain").splitlines(),
            "versions": {name: importlib.metadata.version(name) for name in packages}}
