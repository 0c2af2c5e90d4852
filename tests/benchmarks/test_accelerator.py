"""benchmarks.accelerator without an accelerator: rehearsal, faults, schedule and bad input."""

import importlib.metadata
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.accelerator import __main__, phases, reference, results, schedule, table
from modse_jax import errors
from modse_jax.moe.experts import expert_weights, reference_ffn, select
from tests.conftest import FASTER_TO_COMPILE

ROOT = pathlib.Path(__file__).parents[2]


REQUIRED = ("jax", "flax", "optax", "orbax-checkpoint", "ml-collections")


# Run by every Python process that finds it as sitecustomize.py on its path.
IMPORT_GUARD = """
import json, os, sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not among the packages that this program may need")
BLOCKED = set(json.loads(os.environ["BLOCKED_IMPORTS"]))
sys.meta_path.insert(0, Guard())
"""


def list_other_packages() -> set[str]:
    """Returns the importable names of installed packages that REQUIRED does not depend on."""

    def canonical(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    allowed, waiting = set(), [canonical(name) for name in REQUIRED]
    while waiting:
        name = waiting.pop()
        if name in allowed:
            continue
        allowed.add(name)
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        waiting += [
            canonical(re.match(r"[\w.-]+", line).group())
            for line in needed
            if "extra ==" not in line
        ]
    return {
        module
        for module, packages in importlib.metadata.packages_distributions().items()
        if not any(canonical(package) in allowed for package in packages)
    }


def run_command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.accelerator", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | environment,
        capture_output=True,
        text=True,
    )


def make_run(tmp_path, script, seconds=60.0):
    """Returns a run whose phases are a script that receives their arguments."""
    writer = results.Writer(tmp_path / "results.jsonl", time.time())
    writer.path.touch()
    return __main__.Run(writer, seconds, command=[sys.executable, "-c", script])


def read_rows(run):
    return results.read(run.writer.path)


ONE_BACKEND = "kernels pallas_tpu,layer,step,ragged_dot"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(f"--phases={ONE_BACKEND}", id="one backend"),
        pytest.param("--minutes=9", id="all backends", marks=pytest.mark.slow),
    ],
)
def rehearsal(request, tmp_path_factory):
    """(the finished process, its results) of --tiny, with every other package blocked."""
    folder = tmp_path_factory.mktemp("rehearsal")
    (folder / "sitecustomize.py").write_text(IMPORT_GUARD)
    blocked = list_other_packages()
    assert {"grain", "tensorflow_datasets", "array_record", "tensorboardX", "matplotlib"} <= blocked
    done = run_command(
        "--tiny",
        "--devices=2",
        request.param,
        f"--out={folder}",
        PYTHONPATH=f"{folder}:{ROOT}",
        BLOCKED_IMPORTS=json.dumps(sorted(blocked)),
        XLA_FLAGS=FASTER_TO_COMPILE,
        JAX_NUM_CPU_DEVICES="2",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )
    return done, results.read(folder / "accelerator.jsonl")


def test_a_rehearsal_needs_no_other_package_and_measures_every_phase(rehearsal):
    done, rows = rehearsal
    assert done.returncode == 0, done.stdout + done.stderr
    endings = {
        row["name"]: row["phase"] for row in rows if row["phase"] in ("done", "failed", "stopped")
    }
    assert set(endings.values()) == {"done"}, done.stdout
    assert {"facts", "kernels pallas_tpu", "layer reference", "step reference blocks"} <= set(
        endings
    )
    facts = rows[0]
    assert facts["chip"] == "cpu" and facts["devices"] == 2
    assert facts["versions"]["jax"] == jax.__version__
    assert re.fullmatch("[0-9a-f]{16}", facts["source_digest"])


def test_a_rehearsal_measures_rates_losses_and_kernels(rehearsal):
    _, rows = rehearsal
    kernels = next(row for row in rows if row["phase"] == "kernels")
    assert kernels["correct"] and kernels["same_bits"] and 0 < kernels["errors"]["dw_down"] < 0.01
    layers = {
        (row["case"], row["what"])
        for row in rows
        if row["phase"] == "layer" and row.get("teraflops_per_second", 0) > 0
    }
    both = ("forward", "forward_backward")
    assert layers == {(case, what) for case in ("modse", "equal", "SwiGLU") for what in both} | {
        ("one matmul", "forward")
    }
    step = next(row for row in rows if row["phase"] == "step")
    assert (
        step["tokens_per_second"] > 0 and step["finite"] and step["losses"][-1] < step["losses"][0]
    )
    assert {row["what"] for row in rows if row["phase"] == "ragged_dot"} == {"forward", "dx", "dw"}


def test_a_rehearsal_ends_with_its_tables(rehearsal):
    done, rows = rehearsal
    text = table.format_tables(rows)
    assert text in done.stdout
    for pattern in (
        r"pallas_tpu +tiny +True +True",
        r"layer reference +modse +forward_backward",
        "reference blocks",
        "dx",
    ):
        assert re.search(pattern, text), pattern


# ---- the reference and the search for faults ----

WIDTHS, ROWS = (24, 8, 16, 8), (5, 0, 30, 9)


def run_in_jax(inputs):
    """Computes the same arrays as reference.run_layer, with jax and the slow reference."""
    x_ND, weights, dy_ND = inputs
    rows_E = jnp.asarray(ROWS)
    y_ND, pull = jax.vjp(lambda x, w: reference_ffn.reference(x, rows_E, w, WIDTHS), x_ND, weights)
    dx_ND, gradients = pull(dy_ND)
    return {
        name: np.asarray(a, np.float64)
        for name, a in zip(reference.ARRAYS, (y_ND, dx_ND, *gradients))
    }


@pytest.fixture(scope="module")
def layer():
    """(inputs, the reference's results)."""
    inputs = reference.random_inputs(16, WIDTHS, ROWS, "float32")
    return inputs, reference.run_layer(*inputs, WIDTHS, ROWS)


def test_the_numpy_reference_equals_the_slow_reference(layer):
    inputs, wanted = layer
    assert np.isnan(inputs[0][sum(ROWS) :]).all() and np.isnan(inputs[2][sum(ROWS) :]).all()
    got = run_in_jax(inputs)
    for name, want in wanted.items():
        np.testing.assert_allclose(got[name], want, atol=1e-5 * np.abs(want).max(), err_msg=name)
    assert not reference.find_faults(got, wanted, WIDTHS, ROWS)


def test_a_fault_is_located_by_array_expert_rows_and_columns(layer):
    _, wanted = layer
    got = {name: array.copy() for name, array in wanted.items()}
    got["y"][7:9, 4:8] = 0  # tokens of expert 2, which begin at 5
    got["dw_down"][24 + 3] += 1  # hidden units of expert 1, which has no tokens
    got["dw_up"][2, 24 + 8 + 5] = np.nan  # expert 2
    got["dx"][-1, 0] = 1e-3 + np.abs(wanted["dx"]).max()
    faults = {
        (f["array"], f["expert"]): f for f in reference.find_faults(got, wanted, WIDTHS, ROWS)
    }
    assert set(faults) == {("y", 2), ("dw_down", 1), ("dw_up", 2), ("dx", "padding")}
    assert faults["y", 2]["rows"] == "2-3" and faults["y", 2]["columns"] == "4-7"
    assert faults["dw_down", 1]["rows"] == "3" and faults["dw_down", 1]["columns"] == "0-15"
    assert faults["dw_up", 2]["not_finite"] == 1
    assert (faults["dw_up", 2]["rows"], faults["dw_up", 2]["columns"]) == ("2", "5")


def test_small_errors_everywhere_are_a_fault(layer):
    _, wanted = layer
    got = wanted | {"dw_gate": 1.05 * wanted["dw_gate"]}
    faults = reference.find_faults(got, wanted, WIDTHS, ROWS)
    assert [f["expert"] for f in faults] == [0, 2, 3] and faults[0]["rows"] == "0-15"
    assert reference.relative_errors(got, wanted)["dw_gate"] == pytest.approx(0.05)


def test_ranges_are_short():
    assert reference.list_ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert reference.list_ranges(range(0, 40, 2)).endswith("14, and 12 more")


class FakeKernels:
    """A kernel module that runs the reference, and multiplies some rows of y by `factor`."""

    factor = 1.0

    def tiles_for(self, *_):
        return types.SimpleNamespace(rows=8)

    def unit_for(self, *_):
        return 1

    def check_tasks(self, *_):
        """Accepts any number of rows."""

    def run(self, x_ND, rows_E, weights, placement):
        y_ND = reference_ffn.reference(
            x_ND, rows_E, expert_weights.ExpertWeights(*weights), placement.widths[0]
        )
        return y_ND.at[8:16].multiply(self.factor)

    def forward(self, x_ND, rows_E, weights, shard, placement, tiles, interpret, keep):
        return self.run(x_ND, rows_E, weights, placement), None

    def backward(self, x_ND, rows_E, weights, shard, kept, dy_ND, placement, tiles, interpret):
        def run(x_ND, weights):
            return self.run(x_ND, rows_E, weights, placement)

        _, pull = jax.vjp(run, x_ND, weights)
        dx_ND, dw = pull(dy_ND)
        return dx_ND, *dw


def test_a_backend_with_wrong_kernels_is_reported(monkeypatch):
    """A registered backend has the interface of kernel modules, and nothing else."""
    kernels = FakeKernels()
    monkeypatch.setitem(select.KERNELS, "fake", kernels)
    monkeypatch.setitem(phases.INTERPRETED, "fake", "h100")
    small = phases.Layer(16, WIDTHS, ROWS)
    faults, errors, same_bits = phases.compare_with_reference("fake", small)
    assert not faults and max(errors.values()) < 0.01 and same_bits
    kernels.factor = -1.0
    faults, errors, _ = phases.compare_with_reference("fake", small)
    wrong = {(f["array"], f["expert"]): f["rows"] for f in faults}
    assert wrong["y", 2] == wrong["dx", 2] == "3-10" and ("y", 0) not in wrong and errors["y"] > 0.3


# ---- phases in processes of their own ----


def test_results_of_a_phase_that_is_stopped_later_are_saved(tmp_path):
    script = """
import json, sys, time
with open(json.loads(sys.argv[1])["path"], "a") as file:
    file.write('{"phase": "step", "early": 1}\\n')
time.sleep(60)
"""
    run = make_run(tmp_path, script)
    __main__.run_phase(run, schedule.facts()._replace(limit_seconds=2))
    first, second = read_rows(run)
    assert first["early"] == 1
    assert second["phase"] == "stopped" and "limit of 2 seconds" in second["error"]
    assert second["at"] < 30  # it was not waited for


def test_the_end_of_a_phase_is_recorded(tmp_path):
    run = make_run(tmp_path, "import sys; sys.exit('no such device')", seconds=20)
    __main__.run_phase(run, schedule.facts())
    __main__.run_phase(run, schedule.facts()._replace(name="long", expected_seconds=30))
    failed, skipped = read_rows(run)
    assert (failed["phase"], failed["exit_code"], failed["error"]) == (
        "failed",
        1,
        "no such device",
    )
    assert skipped["phase"] == "skipped" and 0 < skipped["seconds_left"] <= 20
    text = table.format_tables(read_rows(run))
    assert "failed: facts" in text and "no such device" in text and "skipped: long" in text


def test_a_phase_gets_its_flags_and_its_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--mine")
    script = """
import json, os, sys
arguments = json.loads(sys.argv[1])
with open(arguments["path"], "a") as file:
    print(json.dumps({"phase": "x", "flags": os.environ["XLA_FLAGS"], **arguments}), file=file)
"""
    run = make_run(tmp_path, script, seconds=500)
    phase = schedule.step_phases("h100", ["pallas_gpu"])[0]
    autotuned = [p for p in schedule.step_phases("h100", ["pallas_gpu"]) if "autotuned" in p.name]
    __main__.run_phase(run, phase)
    __main__.run_phase(run, autotuned[0])
    row, _, tuned, _ = read_rows(run)
    assert row["flags"] == f"--mine {schedule.NO_TRITON_MATMULS} {schedule.LOOPS_IN_GRAPHS}"
    assert row["options"]["backend"] == "pallas_gpu" and row["kind"] == "step"
    assert f"={tmp_path}/autotuning-step-pallas_gpu-cudnn-autotuned.pbtxt" in tuned["flags"]
    assert schedule.NO_TRITON_MATMULS not in tuned["flags"]


def test_an_interrupted_run_prints_its_tables(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.accelerator", "--tiny", f"--out={tmp_path}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    path = tmp_path / "accelerator.jsonl"
    deadline = time.time() + 60
    while not path.exists() and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert (
        "The run was interrupted here." in output
        and process.returncode == __main__.NOTHING_MEASURED
    )


# ---- the schedule ----


def test_the_most_informative_phases_come_first():
    names = [p.name for p in schedule.kernel_phases("h100", ["pallas_gpu", "pallas_triton"])]
    assert names == [
        "kernels pallas_gpu",
        "kernels pallas_triton",
        "layer pallas_gpu",
        "layer pallas_triton",
    ]
    names = [p.name for p in schedule.step_phases("h100", ["pallas_triton", "pallas_gpu"])]
    assert names[:3] == [
        "step pallas_triton cudnn",
        "step pallas_gpu cudnn",
        "step blocked cudnn",
    ]
    assert len(names) == len(set(names))
    for backend in ("pallas_triton", "pallas_gpu", "blocked"):
        for attention in ("cudnn", "blocks"):
            for words in ("", " deterministic", " no-graphs", " deterministic no-graphs"):
                assert f"step {backend} {attention}{words}" in names
    assert "step pallas_tpu splash" in [p.name for p in schedule.step_phases("v5p", ["pallas_tpu"])]
    assert all("xla_gpu" not in p.flags for p in schedule.step_phases("v5p", ["pallas_tpu"]))


def test_steps_leave_out_backends_with_wrong_kernels_and_begin_with_the_fastest():
    def kernels(backend, correct):
        return {"phase": "kernels", "backend": backend, "correct": correct}

    def layer(backend, what, milliseconds):
        row = {"phase": "layer", "case": "modse", "backend": backend, "what": what}
        return row | {"milliseconds": milliseconds}

    rows = [kernels(b, True) for b in "abc"] + [kernels("c", False)]
    rows += [{"phase": "stopped", "name": "kernels d"}]
    rows += [layer("a", "forward_backward", 3.0), layer("b", "forward_backward", 2.0)]
    rows += [layer("c", "forward_backward", 1.0), layer("a", "forward", 0.1)]
    assert __main__.order_backends("abcd", rows) == ["b", "a"]


def test_steps_are_300mx8_or_its_equal_width_twin():
    modse, equal = (
        phases.step_config("blocked", "blocks", True, equal_widths, tiny=False, devices=2)
        for equal_widths in (False, True)
    )
    assert sum(modse.widths) == sum(equal.widths) == 8 * 3840 and len(set(equal.widths)) == 1
    assert modse.training.batch_size == 32 and modse.data.sequence_length == 4096
    assert modse.mesh.fsdp == 2 and modse.training.deterministic


# ---- results files and bad input ----


def test_an_incomplete_line_is_left_out_and_another_file_is_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"phase": "facts"}\n{"phase": "st')
    assert results.read(path) == [{"phase": "facts"}]
    path.write_text('{"phase": "facts"}\nhello\n{"phase": "done"}\n')
    with pytest.raises(errors.UserError, match="line 2 of .* is not a result"):
        results.read(path)


def test_ratios_in_the_tables():
    def layer(backend, case, rate):
        row = {"phase": "layer", "name": "layer a", "backend": backend, "case": case}
        row |= {"what": "forward", "milliseconds": 1.0, "compiled_peak_gib": 1.0}
        return row | {"teraflops_per_second": rate}

    text = table.format_tables(
        [layer("a", "modse", 300.0), layer("a", "equal", 330.0), layer("dense", "SwiGLU", 600.0)]
    )
    modse = next(line for line in text.splitlines() if "modse" in line).split()
    assert modse[-3:] == ["0.5", "1.1", "1.0"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--minutes=0"], "--minutes=0.0 must be above 0"),
        (["--devices=0"], "--devices=0 must be at least 1"),
        (["--phases=step,layers"], "'layers' is no phase; choose among"),
        (["--speed"], "unrecognized arguments: --speed"),
        (["--show=/nowhere/r.jsonl"], "/nowhere/r.jsonl cannot be read"),
        (["--json=/proc/r.jsonl"], "/proc/r.jsonl cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert __main__.main(arguments) == __main__.BAD_INPUT
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_results_file_is_never_overwritten(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"phase": "facts"}\n')
    with pytest.raises(errors.UserError, match="r.jsonl exists; choose another --json"):
        __main__.open_results(__main__.parse([f"--json={path}"]))
    assert results.read(path) == [{"phase": "facts"}]


def test_a_machine_without_an_accelerator_or_enough_devices_is_refused(tmp_path):
    script = """
import json, sys
with open(json.loads(sys.argv[1])["path"], "a") as file:
    print(json.dumps({"phase": "facts", "chip": "cpu", "backends": [], "devices": 1}), file=file)
"""
    run = make_run(tmp_path, script)
    with pytest.raises(errors.UserError, match="no accelerator on this machine.*--tiny"):
        __main__.run_all(run)
    run = make_run(tmp_path, script)._replace(tiny=True, devices=2)
    with pytest.raises(errors.UserError, match="--devices=2, but jax sees 1"):
        __main__.run_all(run)
