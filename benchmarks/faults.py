"""Faults provoked on purpose, and what became of the run: `make faults`, or

    python -m benchmarks.faults [--json=FILE] [--kills=50]

Runs train.py on a small model in processes of its own: killed at random moments, told to stop, on a full disk, beside a
second one, on other meshes; damages every kind of file of its checkpoints and data; and times what all the care costs.
"""

import argparse
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
from collections.abc import Callable

import jax
import numpy as np
from absl import logging

from modse_jax.config.loading import from_dict
from modse_jax.data import loader
from modse_jax.errors import UserError
from modse_jax.runtime import files, integrity
from modse_jax.training import run_logs, train_step
from modse_jax.training.checkpointing import REWRITTEN, Checkpoints

ROOT = pathlib.Path(__file__).parent.parent


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


# ---- damage ----------------------------------------------------------------------------------------------------------


def flip(file: pathlib.Path, rng: random.Random) -> None:
    """One bit."""
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def _truncate(file, rng, share):
    os.truncate(file, int(share * file.stat().st_size))


def _zero(file, rng):
    data = bytearray(file.read_bytes())
    data[:4096] = bytes(min(4096, len(data)))
    file.write_bytes(data)


def _delete(file, rng):
    file.unlink()


def _replace(file, rng, other):
    shutil.copyfile(other, file)


def _link(file, rng):
    target = file.with_name(file.name + ".target")
    shutil.move(file, target)
    file.symlink_to(target)


def damages(
    step: pathlib.Path, older: pathlib.Path, rng: random.Random
) -> list[tuple[str, str, Callable[[pathlib.Path], None]]]:
    """(what, file, f) for every kind of damage to every file of a step; f(copy of the step) does it. older: another
    step, whose files and manifest take the place of this one's."""
    cases = []
    for name, file in files.list_files(step).items():
        kinds = {
            "deleted": _delete,
            "link": _link,
            "half": functools.partial(_truncate, share=0.5),
            "short": functools.partial(_truncate, share=0.98),
            "empty": functools.partial(_truncate, share=0),
        }
        kinds |= {f"bit {i}": flip for i in range(9 if file.stat().st_size > 20_000 else 5)}
        if file.read_bytes()[:4096].strip(b"\0"):
            kinds["zeros"] = _zero
        twin = older / name
        if twin.is_file() and twin.read_bytes() != file.read_bytes():
            kinds["of another step"] = functools.partial(_replace, other=twin)
        for kind, damage in kinds.items():
            if file.stat().st_size:
                cases.append(
                    (f"{name}: {kind}", name, lambda root, n=name, d=damage: d(root / n, rng))
                )
    cases.append(
        ("an added file", "state/extra", lambda root: (root / "state" / "extra").write_text("x"))
    )
    return cases


def data_flips(directory: pathlib.Path, count: int, rng: random.Random) -> int:
    """How many of `count` bit flips in a prepared dataset, one after another, are refused when it is opened."""
    refused = 0
    for _ in range(count):
        file = rng.choice([f for f in files.list_files(directory).values() if f.stat().st_size])
        before = file.read_bytes()
        flip(file, rng)
        try:
            loader.open_prepared(directory)
        except UserError:
            refused += 1
        file.write_bytes(before)
    return refused


def poisoned(make: Callable, when: Callable) -> Callable:
    """make_train_step whose loss is NaN in the steps of which when(step) is true; the weights are as they were."""

    def made(config, mesh=None):
        step = make(config, mesh)

        def poison(state, batch):
            bad = jax.numpy.where(when(state.step), jax.numpy.nan, 1.0)
            new, m = step(
                state._replace(params=jax.tree.map(lambda p: p * bad, state.params)), batch
            )
            params = jax.tree.map(
                lambda a, b: jax.numpy.where(when(state.step), b, a), new.params, state.params
            )
            return new._replace(params=params), m

        return poison

    return made


# ---- runs ------------------------------------------------------------------------------------------------------------


def corpus(root: pathlib.Path) -> pathlib.Path:
    folder = root / "corpus"
    if not folder.exists():
        folder.mkdir(parents=True)
        for i in range(24):
            (folder / f"{i:02}.txt").write_text(
                "".join(f"line {i}: {i * j} and {j}\n" for j in range(60))
            )
    return folder


def start(
    root: pathlib.Path, name: str, devices: int = 1, code: str = "", **changes
) -> subprocess.Popen:
    """train.py on the small model, in a process group of its own. code: run before it, in its process."""
    values = {
        **SMALL,
        "data.source": f"text:{corpus(root)}",
        **{k.replace("__", "."): v for k, v in changes.items()},
    }
    arguments = [
        "--config=configs/tiny.py",
        f"--workdir={root / name}",
        *(f"--config.{k}={v}" for k, v in values.items()),
    ]
    script = (
        f"import sys; sys.argv[0] = 'train.py'\n{code}\n"
        "from modse_jax.cli import train_command; train_command.run()"
    )
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "GLIBC_TUNABLES": "",
        "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    # Not pipes: nobody reads them while faults are made, and a full one would stop the run.
    out, err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115  (closed by finish)
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=env,
        stdout=out,
        stderr=err,
        start_new_session=True,
    )
    process.said = out, err
    return process


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    process.wait(timeout=120)
    texts = []
    for file in process.said:
        file.seek(0)
        texts.append(file.read())
        file.close()
    return process.returncode, *texts


def last_line(text: str) -> str:
    return ([line for line in text.splitlines() if line.strip()] or [""])[-1]


def final_state(root: pathlib.Path, name: str) -> dict[str, int]:
    """The newest step's fingerprints, as restored."""
    config = from_dict(json.loads((root / name / "config.json").read_text()))
    checkpoints = Checkpoints(root / name / "checkpoints", read_only=True)
    newest = checkpoints.steps()[-1]
    reason = checkpoints.restore(newest, jax.eval_shape(lambda: train_step.init_state(config)))[1]
    assert not checkpoints.verify(newest) and not reason, reason
    prints = checkpoints.meta(newest)["fingerprints"]
    checkpoints.close()
    return {"saved step": newest, **prints}


def kills(root: pathlib.Path, count: int, rng: random.Random) -> dict:
    """SIGKILL at random moments after the first new checkpoint, until `count` have hit; then to the end."""
    straight = start(root, "straight")
    code, _, err = finish(straight)
    assert code == 0, err
    hit, inside, starts = 0, 0, 0
    while hit < count:
        process, starts = start(root, "killed"), starts + 1
        folder, before = root / "killed" / "checkpoints", None
        while process.poll() is None:  # until it has written something
            names = {p.name for p in folder.iterdir()} if folder.exists() else set()
            if before is None:
                before = names
            elif names != before and any(c in "".join(names - before) for c in "0123456789"):
                break
            time.sleep(0.002)
        time.sleep(rng.random() * 0.6)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            hit += 1
            inside += any("tmp" in p.name or p.name == "trash" for p in folder.iterdir())
        process.wait()
        if process.returncode == 0 and hit < count:  # it reached the end: once more from the start
            shutil.rmtree(root / "killed")
    code, _, err = finish(start(root, "killed"))
    assert code == 0, err
    rows = [
        [
            (r["step"], r["split"], r["loss"])
            for r in run_logs.read_log(root / name / "metrics.jsonl")
        ]
        for name in ("straight", "killed")
    ]
    return {
        "kills": hit,
        "starts": starts,
        "during_a_save_or_deletion": inside,
        "equal_to_the_uninterrupted_run": final_state(root, "straight")
        == final_state(root, "killed"),
        "same_log": rows[0] == rows[1],
    }


def corruption(root: pathlib.Path, rng: random.Random) -> dict:
    """Every kind of damage to every file of the newest step: found, or harmless, and the step before restored."""
    source = root / "straight" / "checkpoints"
    newest, older = sorted((p for p in source.iterdir() if p.name.isdigit()), reverse=True)[:2]
    config = from_dict(json.loads((root / "straight" / "config.json").read_text()))
    abstract, counts, work = (
        jax.eval_shape(lambda: train_step.init_state(config)),
        {},
        root / "damaged",
    )
    for name, _, damage in damages(newest, older, rng):
        for step in (newest, older):
            shutil.copytree(step, work / step.name)
        damage(work / newest.name)
        checkpoints = Checkpoints(work, read_only=True)
        step = checkpoints.newest(lambda step, meta: None).step
        state, reason = checkpoints.restore(step, abstract)
        checkpoints.close()
        right = int(state.step) == step and not reason
        key = (
            ("silent: " + name)
            if not right
            else "harmless"
            if step == int(newest.name)
            else "step before restored"
        )
        counts[key] = counts.get(key, 0) + 1
        shutil.rmtree(work)
    return {"cases": sum(counts.values()), **counts}


def disk_full(root: pathlib.Path) -> dict:
    """On a small tmpfs that a filler fills up while the run saves; then there is room again. Needs mount, so root."""
    mount = root / "tmpfs"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(mount)], capture_output=True
    )
    if made.returncode:
        return {"not run": "mounting a tmpfs needs root"}
    try:
        corpus(root)
        shutil.copytree(root / "corpus", mount / "corpus")
        out = {}
        for what, spare, log_every in (
            ("during a save", 100_000, 10**6),
            ("during logging", 4096, 1),
        ):
            process = start(mount, "run", training__steps=4000, training__log_every=log_every)
            folder = mount / "run" / "checkpoints"
            before = {p.name for p in folder.glob("0*[0-9]")}
            while (
                process.poll() is None
                and len({p.name for p in folder.glob("0*[0-9]")} - before) < 2
            ):
                time.sleep(0.01)
            filler = mount / "filler"
            with open(filler, "wb") as file:
                while process.poll() is None:
                    room = shutil.disk_usage(mount).free - spare
                    if room > 0:
                        try:
                            file.write(bytes(min(room, 1 << 20)))
                            file.flush()
                        except OSError:
                            pass
                    time.sleep(0.005)
            code, _, err = finish(process)
            err = "\n".join(line for line in err.splitlines() if line.startswith("error: ")) or err
            filler.unlink()
            good = [p.name for p in folder.glob("0*[0-9]") if not integrity.verify(p, REWRITTEN)]
            after = start(mount, "run", training__steps=4000, training__log_every=1)
            time.sleep(12)
            os.killpg(after.pid, signal.SIGTERM)
            again, text, error = finish(after)
            out[what] = {
                "exit": code,
                "said": last_line(err).replace(str(mount), "DIR"),
                "good_steps_left": len(good),
                "with_room_again_exit": again,
                "resumed": "resuming step" in text,
            }
        return out
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=False)


def second_process(root: pathlib.Path) -> dict:
    first = start(root, "shared", training__steps=100_000, training__checkpoint_every=1000)
    while not (root / "shared" / "config.json").exists():
        time.sleep(0.05)
    code, _, err = finish(
        start(root, "shared", training__steps=100_000, training__checkpoint_every=1000)
    )
    os.killpg(first.pid, signal.SIGTERM)
    return {
        "exit": code,
        "said": last_line(err).replace(str(root), "DIR"),
        "first_exit": finish(first)[0],
    }


def group_sigterm(root: pathlib.Path, count: int, rng: random.Random) -> dict:
    """SIGTERM to the whole process group, as schedulers send it."""
    saved, seconds = 0, []
    for i in range(count):
        process = start(
            root, f"stopped{i}", training__steps=100_000, training__checkpoint_every=100_000
        )
        while not (root / f"stopped{i}" / "config.json").exists():
            time.sleep(0.05)
        time.sleep(1 + rng.random())
        begin = time.monotonic()
        os.killpg(process.pid, signal.SIGTERM)
        code, _, _ = finish(process)
        seconds.append(time.monotonic() - begin)
        folder = root / f"stopped{i}" / "checkpoints"
        saved += code == 75 and any(
            not integrity.verify(p, REWRITTEN) for p in folder.glob("0*[0-9]")
        )
    return {"signals": count, "saved_and_exit_75": saved, "slowest_seconds": round(max(seconds), 2)}


def not_finite(root: pathlib.Path) -> dict:
    """NaN in one batch, and in all from the twentieth on."""
    plant = (
        "from benchmarks import faults; from modse_jax.training import train_step as s; "
        "s.make_train_step = faults.poisoned(s.make_train_step, lambda n: {})"
    )
    one = finish(start(root, "one_nan", code=plant.format("n == 20")))
    every = finish(start(root, "all_nan", code=plant.format("n >= 20")))
    loss = {
        name: [
            r
            for r in run_logs.read_log(root / name / "metrics.jsonl")
            if r["split"] == "validation"
        ][-1]["loss"]
        for name in ("straight", "one_nan")
    }
    return {
        "one": {
            "exit": one[0],
            "steps_skipped": len(run_logs.read_log(root / "one_nan" / "events.jsonl")),
            "validation_loss": loss["one_nan"],
            "clean_validation_loss": loss["straight"],
        },
        "every": {
            "exit": every[0],
            "said": last_line(every[2]),
            "last_good_step": final_state(root, "all_nan")["saved step"],
        },
    }


def meshes(root: pathlib.Path) -> dict:
    """1, 8, 2, 4 virtual devices across restarts: each restore checks fingerprints taken on the mesh before."""
    ends, exits = {}, []
    for devices, stop in ((1, 10), (8, 20), (2, 30), (4, 40)):
        code, out, err = finish(
            start(root, "moved", devices, training__steps=stop, checkpoint__keep=8)
        )
        exits.append(code)
        ends[devices] = (f"resuming step {stop - 10}" in out) if stop > 10 else True
    return {"devices": list(ends), "exits": exits, "resumed_bitwise": all(ends.values())}


def cost(root: pathlib.Path) -> dict:
    """Seconds of a step, with and without a checkpoint's hashes and fingerprints, of a model of 25 MB."""
    from modse_jax.training import state_arrays

    wide = json.loads((root / "straight" / "config.json").read_text())
    wide["model"] |= {"dim": 256, "num_heads": 4, "vocab_size": 4096}
    wide["moe"] |= {"widths": [1000, 200, 600, 600], "width": 600, "backend": "blocked"}
    config = from_dict(wide)
    state = jax.jit(lambda: train_step.init_state(config))()
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    blocking, whole = {"checked": [], "plain": []}, {"checked": [], "plain": []}
    seal, prints, finite = (
        integrity.seal,
        state_arrays.compute_fingerprints,
        state_arrays.all_finite,
    )
    for repeat in range(7):
        for kind in ("plain", "checked"):
            if kind == "plain":
                integrity.seal, state_arrays.compute_fingerprints = (
                    (lambda *a: None),
                    (lambda s: {}),
                )
                state_arrays.all_finite = lambda s: True
            checkpoints = Checkpoints(root / f"cost-{kind}", 2)
            jax.block_until_ready(state)
            begin = time.perf_counter()
            checkpoints.save(
                state._replace(step=jax.numpy.int32(repeat + 1)), {"validation_loss": None}
            )
            blocking[kind].append(time.perf_counter() - begin)
            checkpoints._prune = lambda: None
            checkpoints.close()
            whole[kind].append(time.perf_counter() - begin)
            integrity.seal, state_arrays.compute_fingerprints, state_arrays.all_finite = (
                seal,
                prints,
                finite,
            )
    half = {k: float(np.median(v[2:])) for k, v in blocking.items()}
    total = {k: float(np.median(v[2:])) for k, v in whole.items()}
    return {
        "state_megabytes": round(size / 1e6),
        "training_waits_seconds": half,
        "until_on_disk_seconds": total,
        "share_of_5_minutes_added": (half["checked"] - half["plain"]) / 300,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="a file for the results")
    parser.add_argument("--kills", type=int, default=50)
    a = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)  # orbax tells of every step it takes
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    rng, results = random.Random(0), {}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        root = pathlib.Path(folder)
        for name, fault in {
            "kills": lambda: kills(root, a.kills, rng),
            "corruption": lambda: corruption(root, rng),
            "data_flips": lambda: {
                "flips": 60,
                "refused": data_flips(root / "straight" / "data", 60, rng),
            },
            "disk_full": lambda: disk_full(root),
            "second_process": lambda: second_process(root),
            "group_sigterm": lambda: group_sigterm(root, 10, rng),
            "not_finite": lambda: not_finite(root),
            "meshes": lambda: meshes(root),
            "cost": lambda: cost(root),
        }.items():
            begin = time.monotonic()
            results[name] = {**fault(), "seconds": round(time.monotonic() - begin)}
            print(name, json.dumps(results[name]), flush=True)
    if a.json:
        pathlib.Path(a.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
