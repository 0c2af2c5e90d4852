"""Helpers for tests of training runs, in this process or as a user starts them."""

import contextlib
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from modse_jax.config.options import Config
from modse_jax.training import startup, train_step
from modse_jax.training.checkpointing import Checkpoints
from modse_jax.training.programs import Programs
from tests.conftest import CACHE_OPTIONS, FASTER_TO_COMPILE
from tests.helpers.configs import tiny_config

ROOT = pathlib.Path(__file__).parents[2]

# Options that make a run small enough for a test.
OVERRIDES = dict(
    model=dict(dim=16, num_layers=2, num_heads=2, context_length=64, vocab_size=300),
    moe=dict(width=12, widths="(20,4,12,12)", num_experts=4, backend="reference"),
    data=dict(tokenizer="bytes", sequence_length=32),
    training=dict(batch_size=8, steps=6, log_every=2, checkpoint_every=3),
    optimizer=dict(warmup_steps=2),
    evaluation=dict(batch_size=8, sample_tokens=4),
    advanced=dict(unroll=1),
)


def config_for(corpus: pathlib.Path, **sections) -> Config:
    """Returns the tiny config with a folder of text files as its data."""
    sections.setdefault("data", {})["source"] = f"text:{corpus}"
    return tiny_config(**sections)


def state_of(workdir: pathlib.Path, config: Config, step: int = 0) -> train_step.State:
    """Returns a saved state on the host; step 0 is the newest."""
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=device),
        jax.eval_shape(lambda: train_step.init_state(config)),
    )
    state, reason = checkpoints.restore(step or checkpoints.steps()[-1], abstract)
    assert not reason
    checkpoints.close()
    return jax.device_get(state)


def save_untrained_run(config: Config, workdir: pathlib.Path, step: int) -> None:
    """Saves initial weights as the checkpoint of a step, without compiling a training step."""
    with contextlib.ExitStack() as cleanup, pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup, "compile_step", lambda *_: None)
        context, restored = startup.prepare_run(config, workdir, cleanup, Programs())
        startup.write_description(config, workdir)
        state = startup.first_state(context, restored, Programs())._replace(
            step=jax.numpy.int32(step)
        )
        context.checkpoints.save(state, {**context.metadata, "validation_loss": None})
        context.checkpoints.close()


def environment(devices: int = 2) -> dict[str, str]:
    """Returns environment variables for a process that compiles fast on CPU devices."""
    cache = {name.upper(): str(value) for name, value in CACHE_OPTIONS.items()}
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "XLA_FLAGS": FASTER_TO_COMPILE,
        **cache,
    }


def command(script: str, *args: str, devices: int = 2, wait: bool = True):
    """Runs a script of this repository as a user does.

    Returns:
      (stdout, stderr, exit code), or the process without waiting for it.
    """
    process = subprocess.Popen(
        [sys.executable, script, *args],
        cwd=ROOT,
        env=environment(devices),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if not wait:
        return process
    stdout, stderr = process.communicate(timeout=240)
    return stdout, stderr, process.returncode


def overrides(**extra) -> list[str]:
    """Returns OVERRIDES, changed by `extra` ({"section.option": value}), as flags."""
    values = {
        f"{section}.{option}": value
        for section, options in OVERRIDES.items()
        for option, value in options.items()
    }
    return [f"--config.{name}={value}" for name, value in {**values, **extra}.items()]


def train_args(corpus: pathlib.Path, workdir: pathlib.Path, **extra) -> list[str]:
    """Returns the arguments of train.py for a small run."""
    flags = overrides(**{"data.source": f"text:{corpus}", **extra})
    return ["--config=configs/tiny.py", f"--workdir={workdir}", *flags]
