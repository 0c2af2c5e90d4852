"""Provokes faults on purpose, and records what became of the run: `make faults`, or

    python -m tests.helpers.faults [--json=FILE] [--kills=50]

Runs train.py on a small model in separate processes. They are killed at random moments, stopped by
signals, run on a full disk, beside a second process, and on other meshes. Every kind of file of
their checkpoints and data is damaged. The last part times what the checks of checkpoints cost.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
from absl import logging

from modse_jax.config.loading import from_dict
from modse_jax.config.options import Config
from modse_jax.data import prepared_data
from modse_jax.errors import UserError
from modse_jax.runtime import files, integrity
from modse_jax.training import run_logs, state_arrays, train_step
from modse_jax.training.checkpointing import REWRITTEN, Checkpoints

ROOT = pathlib.Path(__file__).parents[2]
HANG_SECONDS = 300  # a run that takes this long hangs, also on a slow and busy machine

SMALL = {
    "model.dim": 16,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.context_length": 64,
    "model.vocab_size": 300,
    "moe.width": 12,
    "moe.widths": "(20,4,12,12)",
    "moe.num_experts": 4,
    "moe.backend": "reference",
    "data.tokenizer": "bytes",
    "data.sequence_length": 32,
    "training.batch_size": 8,
    "training.steps": 60,
    "training.log_every": 5,
    "training.checkpoint_every": 2,
    "checkpoint.keep": 2,
    "optimizer.warmup_steps": 2,
    "evaluation.batch_size": 8,
    "evaluation.sample_tokens": 4,
}

FOREVER = 100_000  # more steps than a run can take here

SAVED_STEPS = "0*[0-9]"  # names of complete checkpoints

# ---- damage --------------------------------------------------------------------------------------

DamageFile = Callable[[pathlib.Path, random.Random], None]


class Damage(NamedTuple):
    """One kind of damage to one file of a checkpoint."""

    name: str
    file: str  # relative to the checkpoint
    apply: Callable[[pathlib.Path], None]  # damages the checkpoint in a folder


def flip(file: pathlib.Path, rng: random.Random) -> None:
    """Flips one random bit."""
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def _truncate(file: pathlib.Path, rng: random.Random, share: float) -> None:
    os.truncate(file, int(share * file.stat().st_size))


def _zero_first_page(file: pathlib.Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[:4096] = bytes(min(4096, len(data)))
    file.write_bytes(data)


def _delete(file: pathlib.Path, rng: random.Random) -> None:
    file.unlink()


def _replace(file: pathlib.Path, rng: random.Random, other: pathlib.Path) -> None:
    shutil.copyfile(other, file)


def _replace_by_link(file: pathlib.Path, rng: random.Random) -> None:
    target = file.with_name(file.name + ".target")
    shutil.move(file, target)
    file.symlink_to(target)


def damages(step: pathlib.Path, older: pathlib.Path, rng: random.Random) -> list[Damage]:
    """Returns every kind of damage to every file of a checkpoint.

    Args:
        step: folder of the checkpoint.
        older: folder of another one, whose files replace those of this one.
        rng: for random bits.
    """
    cases = []
    for name, file in files.list_files(step).items():
        if file.stat().st_size == 0:
            continue
        for kind, damage in _list_damages_of_file(file, older / name).items():
            apply = functools.partial(_damage_file, name=name, damage=damage, rng=rng)
            cases.append(Damage(f"{name}: {kind}", name, apply))
    cases.append(Damage("an added file", "state/extra", _add_file))
    return cases


def _list_damages_of_file(file: pathlib.Path, twin: pathlib.Path) -> dict[str, DamageFile]:
    kinds: dict[str, DamageFile] = {
        "deleted": _delete,
        "link": _replace_by_link,
        "half": functools.partial(_truncate, share=0.5),
        "short": functools.partial(_truncate, share=0.98),
        "empty": functools.partial(_truncate, share=0),
    }
    num_flips = 9 if file.stat().st_size > 20_000 else 5
    kinds |= {f"bit {number}": flip for number in range(num_flips)}
    if file.read_bytes()[:4096].strip(b"\0"):
        kinds["zeros"] = _zero_first_page
    if twin.is_file() and twin.read_bytes() != file.read_bytes():
        kinds["of another step"] = functools.partial(_replace, other=twin)
    return kinds


def _damage_file(root: pathlib.Path, name: str, damage: DamageFile, rng: random.Random) -> None:
    damage(root / name, rng)


def _add_file(root: pathlib.Path) -> None:
    (root / "state" / "extra").write_text("x")


def data_flips(directory: pathlib.Path, count: int, rng: random.Random) -> int:
    """Returns how many of `count` bit flips in a prepared dataset are refused when it is opened.

    The flips are made and undone one after the other.
    """
    refused = 0
    for _ in range(count):
        candidates = [file for file in files.list_files(directory).values() if file.stat().st_size]
        file = rng.choice(candidates)
        before = file.read_bytes()
        flip(file, rng)
        try:
            prepared_data.open_prepared(directory)
        except UserError:
            refused += 1
        file.write_bytes(before)
    return refused


def poisoned(make: Callable, when: Callable) -> Callable:
    """Returns a make_train_step whose loss is NaN in some steps.

    Args:
        make: make_train_step.
        when: when(step) is true for the steps with a NaN. Their weights stay as they were.
    """

    def make_poisoned(config: Config, mesh: Any = None) -> Callable:
        step = make(config, mesh)

        def run_step(state: train_step.State, batch: dict) -> tuple:
            is_bad = when(state.step)
            factor = jax.numpy.where(is_bad, jax.numpy.nan, 1.0)
            bad_params = jax.tree.map(lambda array: array * factor, state.params)
            new, metrics = step(state._replace(params=bad_params), batch)
            params = jax.tree.map(
                lambda updated, old: jax.numpy.where(is_bad, old, updated),
                new.params,
                state.params,
            )
            return new._replace(params=params), metrics

        return run_step

    return make_poisoned


# ---- runs ----------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A running train.py. Its output goes to files: a full pipe would stop it."""

    process: subprocess.Popen
    stdout: TextIO
    stderr: TextIO


class Ended(NamedTuple):
    """A train.py that has ended."""

    code: int
    stdout: str
    stderr: str


def write_corpus(root: pathlib.Path) -> pathlib.Path:
    """Writes 24 text files, unless they exist, and returns their folder."""
    folder = root / "corpus"
    if not folder.exists():
        folder.mkdir(parents=True)
        for i in range(24):
            text = "".join(f"line {i}: {i * j} and {j}\n" for j in range(60))
            (folder / f"{i:02}.txt").write_text(text)
    return folder


def start(root: pathlib.Path, name: str, devices: int = 1, code: str = "", **changes) -> Run:
    """Starts train.py on the small model, in a separate process group.

    Args:
        root: folder of all runs.
        name: of the run; its workdir is root / name.
        devices: number of virtual CPU devices.
        code: Python code that the process runs first.
        changes: other options; `training__steps` stands for training.steps.
    """
    values = {
        **SMALL,
        "data.source": f"text:{write_corpus(root)}",
        **{option.replace("__", "."): value for option, value in changes.items()},
    }
    arguments = [
        "--config=configs/tiny.py",
        f"--workdir={root / name}",
        *(f"--config.{option}={value}" for option, value in values.items()),
    ]
    script = (
        f"import sys; sys.argv[0] = 'train.py'\n{code}\n"
        "from modse_jax.cli import train_command; train_command.run()"
    )
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "GLIBC_TUNABLES": "",
        "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    stdout = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by finish)
    stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )
    return Run(process, stdout, stderr)


def finish(run: Run) -> Ended:
    """Waits for a run and returns its exit code and output."""
    run.process.wait(timeout=HANG_SECONDS)
    texts = []
    for file in (run.stdout, run.stderr):
        file.seek(0)
        texts.append(file.read())
        file.close()
    return Ended(run.process.returncode, *texts)


def run_to_end(root: pathlib.Path, name: str, **options) -> Ended:
    """Starts a run and waits for its end."""
    return finish(start(root, name, **options))


def last_line(text: str) -> str:
    """Returns the last line that is not empty, or ""."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def load_config(workdir: pathlib.Path) -> Config:
    """Returns the config of a run."""
    return from_dict(json.loads((workdir / "config.json").read_text()))


def final_state(root: pathlib.Path, name: str) -> dict[str, int]:
    """Returns the newest saved step of a run and the fingerprints of its restored arrays."""
    config = load_config(root / name)
    checkpoints = Checkpoints(root / name / "checkpoints", read_only=True)
    newest = checkpoints.steps()[-1]
    abstract = jax.eval_shape(lambda: train_step.init_state(config))
    _, problem = checkpoints.restore(newest, abstract)
    assert not checkpoints.verify(newest) and not problem, problem
    fingerprints = checkpoints.meta(newest)["fingerprints"]
    checkpoints.close()
    return {"saved step": newest, **fingerprints}


def wait_for_file(path: pathlib.Path) -> None:
    """Waits until a file exists."""
    while not path.exists():
        time.sleep(0.05)


# ---- faults --------------------------------------------------------------------------------------


def _list_names(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def _wait_for_new_checkpoint(process: subprocess.Popen, folder: pathlib.Path) -> None:
    """Waits until a run begins to write a checkpoint, or has ended."""
    before: set[str] | None = None
    while process.poll() is None:
        names = _list_names(folder)
        if before is None:
            before = names
        elif names != before and any(char.isdecimal() for char in "".join(names - before)):
            break
        time.sleep(0.002)


def _read_losses(workdir: pathlib.Path) -> list[tuple]:
    rows = run_logs.read_log(workdir / "metrics.jsonl")
    return [(row["step"], row["split"], row["loss"]) for row in rows]


def kills(root: pathlib.Path, count: int, rng: random.Random) -> dict:
    """Kills a run at random moments after its first new checkpoint, `count` times.

    Then it runs to its end, and is compared with a run that was not interrupted.
    """
    ended = run_to_end(root, "straight")
    assert ended.code == 0, ended.stderr
    hits = 0
    starts = 0
    during_writes = 0
    folder = root / "killed" / "checkpoints"
    while hits < count:
        process = start(root, "killed").process
        starts += 1
        _wait_for_new_checkpoint(process, folder)
        time.sleep(rng.random() * 0.6)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            hits += 1
            during_writes += any("tmp" in name or name == "trash" for name in _list_names(folder))
        process.wait()
        if process.returncode == 0 and hits < count:  # It reached its end: it starts afresh.
            shutil.rmtree(root / "killed")
    ended = run_to_end(root, "killed")
    assert ended.code == 0, ended.stderr
    return {
        "kills": hits,
        "starts": starts,
        "during_a_save_or_deletion": during_writes,
        "equal_to_the_uninterrupted_run": final_state(root, "straight")
        == final_state(root, "killed"),
        "same_log": _read_losses(root / "straight") == _read_losses(root / "killed"),
    }


def corruption(root: pathlib.Path, rng: random.Random) -> dict:
    """Damages every file of the newest checkpoint in every way, and restores.

    Damage must be harmless, or the checkpoint before must be restored.
    """
    source = root / "straight" / "checkpoints"
    steps = sorted((path for path in source.iterdir() if path.name.isdigit()), reverse=True)
    newest, older = steps[:2]
    config = load_config(root / "straight")
    abstract = jax.eval_shape(lambda: train_step.init_state(config))
    counts: Counter[str] = Counter()
    work = root / "damaged"
    for damage in damages(newest, older, rng):
        for step in (newest, older):
            shutil.copytree(step, work / step.name)
        damage.apply(work / newest.name)
        checkpoints = Checkpoints(work, read_only=True)
        found = checkpoints.newest(lambda step, meta: None).step
        state, problem = checkpoints.restore(found, abstract)
        checkpoints.close()
        if problem or int(state.step) != found:
            counts["silent: " + damage.name] += 1
        elif found == int(newest.name):
            counts["harmless"] += 1
        else:
            counts["step before restored"] += 1
        shutil.rmtree(work)
    return {"cases": sum(counts.values()), **counts}


@contextlib.contextmanager
def _mounted_tmpfs(mount: pathlib.Path) -> Iterator[bool]:
    """Mounts a file system of 24 MB. Yields False if that is not allowed."""
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True).returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=False)


def _fill_disk(mount: pathlib.Path, spare: int, process: subprocess.Popen) -> pathlib.Path:
    """Keeps all but `spare` bytes of a disk full until a process ends. Returns the filler."""
    filler = mount / "filler"
    with filler.open("wb") as file:
        while process.poll() is None:
            free = shutil.disk_usage(mount).free - spare
            if free > 0:
                with contextlib.suppress(OSError):
                    file.write(bytes(min(free, 1 << 20)))
                    file.flush()
            time.sleep(0.005)
    return filler


def _run_on_full_disk(mount: pathlib.Path, spare: int, log_every: int) -> dict:
    run = start(mount, "run", training__steps=4000, training__log_every=log_every)
    folder = mount / "run" / "checkpoints"
    before = {path.name for path in folder.glob(SAVED_STEPS)}
    while run.process.poll() is None:
        names = {path.name for path in folder.glob(SAVED_STEPS)}
        if len(names - before) >= 2:
            break
        time.sleep(0.01)
    filler = _fill_disk(mount, spare, run.process)
    ended = finish(run)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    message = "\n".join(errors) or ended.stderr
    filler.unlink()
    good = [path for path in folder.glob(SAVED_STEPS) if not integrity.verify(path, REWRITTEN)]
    again = start(mount, "run", training__steps=4000, training__log_every=1)
    time.sleep(12)
    os.killpg(again.process.pid, signal.SIGTERM)
    ended_again = finish(again)
    return {
        "exit": ended.code,
        "said": last_line(message).replace(str(mount), "DIR"),
        "good_steps_left": len(good),
        "with_room_again_exit": ended_again.code,
        "resumed": "resuming step" in ended_again.stdout,
    }


def disk_full(root: pathlib.Path) -> dict:
    """Fills a small disk while a run saves or logs, then makes room and runs again. Needs root."""
    mount = root / "tmpfs"
    with _mounted_tmpfs(mount) as is_mounted:
        if not is_mounted:
            return {"not run": "mounting a tmpfs needs root"}
        write_corpus(root)
        shutil.copytree(root / "corpus", mount / "corpus")
        return {
            "during a save": _run_on_full_disk(mount, spare=100_000, log_every=10**6),
            "during logging": _run_on_full_disk(mount, spare=4096, log_every=1),
        }


def second_process(root: pathlib.Path) -> dict:
    """Starts a second run in the workdir of another one."""
    options = {"training__steps": FOREVER, "training__checkpoint_every": 1000}
    first = start(root, "shared", **options)
    wait_for_file(root / "shared" / "config.json")
    second = run_to_end(root, "shared", **options)
    os.killpg(first.process.pid, signal.SIGTERM)
    return {
        "exit": second.code,
        "said": last_line(second.stderr).replace(str(root), "DIR"),
        "first_exit": finish(first).code,
    }


def group_sigterm(root: pathlib.Path, count: int, rng: random.Random) -> dict:
    """Sends SIGTERM to the process group of a run, as schedulers do."""
    saved = 0
    seconds = []
    for number in range(count):
        workdir = root / f"stopped{number}"
        run = start(root, workdir.name, training__steps=FOREVER, training__checkpoint_every=FOREVER)
        wait_for_file(workdir / "config.json")
        time.sleep(1 + rng.random())
        begin = time.monotonic()
        os.killpg(run.process.pid, signal.SIGTERM)
        ended = finish(run)
        seconds.append(time.monotonic() - begin)
        steps = (workdir / "checkpoints").glob(SAVED_STEPS)
        saved += ended.code == 75 and any(not integrity.verify(s, REWRITTEN) for s in steps)
    return {"signals": count, "saved_and_exit_75": saved, "slowest_seconds": round(max(seconds), 2)}


def _last_validation_loss(workdir: pathlib.Path) -> float:
    rows = run_logs.read_log(workdir / "metrics.jsonl")
    return [row for row in rows if row["split"] == "validation"][-1]["loss"]


def not_finite(root: pathlib.Path) -> dict:
    """Makes the loss NaN in one step, and in all steps from the twentieth on."""
    plant = (
        "from tests.helpers import faults; from modse_jax.training import train_step as s; "
        "s.make_train_step = faults.poisoned(s.make_train_step, lambda n: {})"
    )
    one = run_to_end(root, "one_nan", code=plant.format("n == 20"))
    every = run_to_end(root, "all_nan", code=plant.format("n >= 20"))
    return {
        "one": {
            "exit": one.code,
            "steps_skipped": len(run_logs.read_log(root / "one_nan" / "events.jsonl")),
            "validation_loss": _last_validation_loss(root / "one_nan"),
            "clean_validation_loss": _last_validation_loss(root / "straight"),
        },
        "every": {
            "exit": every.code,
            "said": last_line(every.stderr),
            "last_good_step": final_state(root, "all_nan")["saved step"],
        },
    }


def meshes(root: pathlib.Path) -> dict:
    """Restarts a run on 1, 8, 2 and 4 virtual devices.

    Each restore checks fingerprints that were computed on the mesh before.
    """
    resumed = []
    exits = []
    stops = {1: 10, 8: 20, 2: 30, 4: 40}
    for devices, stop in stops.items():
        ended = run_to_end(root, "moved", devices=devices, training__steps=stop, checkpoint__keep=8)
        exits.append(ended.code)
        resumed.append(stop == 10 or f"resuming step {stop - 10}" in ended.stdout)
    return {"devices": list(stops), "exits": exits, "resumed_bitwise": all(resumed)}


# ---- cost ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_checks() -> Iterator[None]:
    """Saves checkpoints without manifests, fingerprints and the check for NaN."""
    seal = integrity.seal
    compute_fingerprints = state_arrays.compute_fingerprints
    all_finite = state_arrays.all_finite
    integrity.seal = lambda *_: None
    state_arrays.compute_fingerprints = lambda *_: {}
    state_arrays.all_finite = lambda _: True
    try:
        yield
    finally:
        integrity.seal = seal
        state_arrays.compute_fingerprints = compute_fingerprints
        state_arrays.all_finite = all_finite


class SaveSeconds(NamedTuple):
    """Durations of one save."""

    blocking: float  # until training continues
    total: float  # until the checkpoint is on disk


def _time_save(folder: pathlib.Path, state: train_step.State) -> SaveSeconds:
    checkpoints = Checkpoints(folder, 2)
    jax.block_until_ready(state)
    begin = time.perf_counter()
    checkpoints.save(state, {"validation_loss": None})
    blocking = time.perf_counter() - begin
    checkpoints._prune = lambda: None
    checkpoints.close()
    return SaveSeconds(blocking, time.perf_counter() - begin)


def cost(root: pathlib.Path) -> dict:
    """Times checkpoints of a model of 25 MB, with and without hashes and fingerprints."""
    wide = json.loads((root / "straight" / "config.json").read_text())
    wide["model"] |= {"dim": 256, "num_heads": 4, "vocab_size": 4096}
    wide["moe"] |= {"widths": [1000, 200, 600, 600], "width": 600, "backend": "blocked"}
    config = from_dict(wide)
    state = jax.jit(lambda: train_step.init_state(config))()
    size = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(state))
    saves: dict[str, list[SaveSeconds]] = {"checked": [], "plain": []}
    for repeat in range(7):
        numbered = state._replace(step=jax.numpy.int32(repeat + 1))
        with _without_checks():
            saves["plain"].append(_time_save(root / "cost-plain", numbered))
        saves["checked"].append(_time_save(root / "cost-checked", numbered))
    medians = {
        kind: SaveSeconds(*(float(np.median(column)) for column in zip(*seconds[2:])))
        for kind, seconds in saves.items()
    }
    added = medians["checked"].blocking - medians["plain"].blocking
    return {
        "state_megabytes": round(size / 1e6),
        "training_waits_seconds": {kind: seconds.blocking for kind, seconds in medians.items()},
        "until_on_disk_seconds": {kind: seconds.total for kind, seconds in medians.items()},
        "share_of_5_minutes_added": added / 300,
    }


def run_all(root: pathlib.Path, num_kills: int) -> dict[str, dict]:
    """Provokes every fault, in order, and prints what became of each."""
    rng = random.Random(0)

    def flip_data() -> dict:
        return {"flips": 60, "refused": data_flips(root / "straight" / "data", 60, rng)}

    faults: dict[str, Callable[[], dict]] = {
        "kills": lambda: kills(root, num_kills, rng),
        "corruption": lambda: corruption(root, rng),
        "data_flips": flip_data,
        "disk_full": lambda: disk_full(root),
        "second_process": lambda: second_process(root),
        "group_sigterm": lambda: group_sigterm(root, 10, rng),
        "not_finite": lambda: not_finite(root),
        "meshes": lambda: meshes(root),
        "cost": lambda: cost(root),
    }
    results = {}
    for name, fault in faults.items():
        begin = time.monotonic()
        results[name] = {**fault(), "seconds": round(time.monotonic() - begin)}
        print(name, json.dumps(results[name]), flush=True)
    return results


def main(arguments: list[str] | None = None) -> None:
    """Provokes every fault in a temporary folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="file to write the results to")
    parser.add_argument("--kills", type=int, default=50, help="number of kills")
    options = parser.parse_args(arguments)
    logging.set_verbosity(logging.ERROR)  # Orbax logs every step of a save
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        results = run_all(pathlib.Path(folder), options.kills)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
