"""TODO"""

import os
import pathlib
import subprocess
import sys

import jax

from modse_jax.training import train_step
from modse_jax.training.checkpointing import Checkpoints
from tests.conftest import CACHE_OPTIONS, FASTER_TO_COMPILE
from tests.helpers.configs import tiny_config

ROOT = pathlib.Path(__file__).parents[2]


OVERRIDES = dict(
    model=dict(dim=16, num_layers=2, num_heads=2, context_length=64, vocab_size=300, unroll=1),
    moe=dict(width=12, widths="(20,4,12,12)", num_experts=4, backend="reference"),
    data=dict(tokenizer="bytes", sequence_length=32),
    training=dict(batch_size=8, steps=6, log_every=2, checkpoint_every=3),
    optimizer=dict(warmup_steps=2),
    evaluation=dict(batch_size=8, sample_tokens=4),
)


def config_for(corpus, **sections):
    sections.setdefault("data", {})["source"] = f"text:{corpus}"
    return tiny_config(**sections)


def state_of(workdir, config, step=0):
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        ),
        jax.eval_shape(lambda: train_step.init_state(config)),
    )
    state, reason = checkpoints.restore(step or checkpoints.steps()[-1], abstract)
    assert not reason
    checkpoints.close()
    return jax.device_get(state)


# ---- the scripts, as a user calls them -------------------------------------------------------------------------------


def command(script, *args, devices=2, wait=True):
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "XLA_FLAGS": FASTER_TO_COMPILE,
        **{name.upper(): str(value) for name, value in CACHE_OPTIONS.items()},
    }
    process = subprocess.Popen(
        [sys.executable, script, *args],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    return process.communicate(timeout=240) + (process.returncode,) if wait else process


def overrides(**extra):
    values = {f"{s}.{k}": v for s, section in OVERRIDES.items() for k, v in section.items()} | extra
    return [f"--config.{k}={v}" for k, v in values.items()]


def train_args(corpus, workdir, **extra):
    flags = overrides(**{"data.source": f"text:{corpus}", **extra})
    return ["--config=configs/tiny.py", f"--workdir={workdir}", *flags]
