"""The compiled programs of a run, which several runs of one process may share."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from modse_jax.config.options import Config
from modse_jax.training import console, hyperparameters, train_step
from modse_jax.training.hyperparameters import Hyperparameters
from modse_jax.training.train_step import Batch, Metrics, ScoreStep, State


class CompiledStep(NamedTuple):
    """A compiled training step.

    Attributes:
      program: the program.
      seconds: how long its compilation took; 0 if an earlier run has compiled it.
      inputs: the hyperparameters, if they are inputs of the program.
    """

    program: jax.stages.Compiled
    seconds: float
    inputs: Hyperparameters | None = None

    def execute(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """Trains one step. The state is donated."""
        if self.inputs is None:
            return self.program(state, batch)
        return self.program(state, batch, self.inputs)


class Programs:
    """Compiles the programs of one run, with its hyperparameters and its seed as constants."""

    def train_step(self, config: Config, mesh: Mesh) -> CompiledStep:
        """Compiles the training step."""
        program, seconds = _compile(lambda: train_step.compile_train_step(config, mesh))
        return CompiledStep(program, seconds)

    def score_step(self, config: Config, mesh: Mesh) -> ScoreStep:
        """Returns the jitted scoring step of validation."""
        return train_step.jitted_score_step(config, mesh)

    def initial_state(self, config: Config, mesh: Mesh) -> State:
        """Returns the state before the first step."""
        return train_step.init_sharded_state(config, mesh)


class SharedPrograms(Programs):
    """Programs of runs that follow each other, with hyperparameters and seed as inputs.

    The programs of the last shape are kept; those of the shape before are freed.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._programs: dict[str, Any] = {}

    def train_step(self, config: Config, mesh: Mesh) -> CompiledStep:
        """Returns the compiled training step, which is reused if an earlier run had the same."""
        seconds = 0.0
        inputs = hyperparameters.to_arrays(hyperparameters.from_config(config))

        def compile_step() -> jax.stages.Compiled:
            nonlocal seconds
            program, seconds = _compile(lambda: train_step.compile_shared_train_step(config, mesh))
            return program

        program = self._find("train", config, mesh, compile_step)
        return CompiledStep(program, seconds, inputs)

    def score_step(self, config: Config, mesh: Mesh) -> ScoreStep:
        """Returns the jitted scoring step of validation, of this run or of an earlier one."""
        return self._find("score", config, mesh, lambda: train_step.jitted_score_step(config, mesh))

    def initial_state(self, config: Config, mesh: Mesh) -> State:
        """Returns the state before the first step."""
        initialize = self._find(
            "init", config, mesh, lambda: train_step.jitted_init_state(config, mesh)
        )
        return initialize(config.seed)

    def _find(self, name: str, config: Config, mesh: Mesh, build: Callable[[], Any]) -> Any:
        """Returns a program of the shape of a config, which is built if it is missing."""
        key = hyperparameters.shared_program_config(config), mesh
        if key != self._key:
            self._key = key
            self._programs = {}
        if name not in self._programs:
            self._programs[name] = build()
        return self._programs[name]


def _compile(build: Callable[[], jax.stages.Compiled]) -> tuple[jax.stages.Compiled, float]:
    """Returns a compiled training step, and how many seconds it took to compile or to load it."""
    console.log(
        "compiling the training step, or loading it from the compilation cache; the more distinct "
        "widths of experts, the longer it takes"
    )
    start = time.monotonic()
    program = build()
    return program, time.monotonic() - start
