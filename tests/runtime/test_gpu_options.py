"""XLA's options for GPU programs: where they are given, and what is left out."""

import dataclasses

import jax
import pytest

from modse_jax.config import device_mesh
from modse_jax.config.options import MeshConfig
from modse_jax.model import sampling, transformer
from modse_jax.model.variables import Variables
from modse_jax.runtime import gpu_options
from modse_jax.training import train_step
from tests.helpers.configs import tiny_config


class Gpu:
    """Stands for a device of the platform "gpu": only that is read before XLA is asked."""

    platform = "gpu"


@pytest.fixture
def xla(monkeypatch):
    """Replaces the probe of XLA; returns the set of options that it shall not know."""
    unknown = set()
    monkeypatch.setattr(gpu_options, "_is_known", lambda device, name, value: name not in unknown)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    return unknown


def test_other_platforms_get_no_options(xla):
    assert gpu_options.compiler_options(jax.devices()[0]) == {}
    assert train_step.compiler_options(None) == {}


def test_a_gpu_gets_all_options_that_its_xla_knows(xla):
    assert gpu_options.compiler_options(Gpu()) == gpu_options.OPTIONS
    assert "WHILE" in gpu_options.OPTIONS["xla_gpu_enable_command_buffer"].split(",")
    xla.add("xla_gpu_dot_merger_threshold_mb")
    assert set(gpu_options.compiler_options(Gpu())) == {"xla_gpu_enable_command_buffer"}


def test_xla_flags_of_the_environment_win(xla, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0")
    assert set(gpu_options.compiler_options(Gpu())) == {"xla_gpu_dot_merger_threshold_mb"}


def test_xla_is_asked_by_a_small_program():
    """An option that does not exist and a value that does not exist both count as unknown."""
    cpu = jax.devices()[0]
    assert not gpu_options._is_known(cpu, "xla_gpu_no_such_option", 1)
    assert gpu_options._is_known(cpu, "xla_gpu_dot_merger_threshold_mb", 0)
    known = gpu_options.OPTIONS["xla_gpu_enable_command_buffer"]
    assert gpu_options._is_known(cpu, "xla_gpu_enable_command_buffer", known)
    assert not gpu_options._is_known(cpu, "xla_gpu_enable_command_buffer", known + ",NOTHING")


def test_the_step_and_the_score_step_are_compiled_with_them(monkeypatch):
    """A refused option ends both compilations. Small programs stand for both steps."""
    monkeypatch.setattr(
        gpu_options, "compiler_options", lambda device: {"xla_no_such_option": True}
    )
    config = dataclasses.replace(tiny_config(), mesh=MeshConfig(1, 1, 1))
    mesh = device_mesh.build_mesh(config, jax.devices()[:1])
    monkeypatch.setattr(
        train_step, "lower_train_step", lambda config, mesh: jax.jit(lambda a: a + 1).lower(1.0)
    )
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="No such compile option: 'xla_no_such_option'"
    ):
        train_step.compile_train_step(config, mesh)
    monkeypatch.setattr(train_step, "make_score_step", lambda config, mesh, trace: lambda a: a + 1)
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="No such compile option: 'xla_no_such_option'"
    ):
        train_step.jitted_score_step(config, mesh).lower(1.0).compile()


def test_text_is_generated_by_programs_compiled_with_them(monkeypatch):
    """A device without options uses `prefill` and `decode` themselves, another its own jits."""
    device = jax.devices()[0]
    sampling.programs_for.cache_clear()
    assert sampling.programs_for(device) == (sampling.prefill, sampling.decode)
    sampling.programs_for.cache_clear()
    monkeypatch.setattr(
        gpu_options, "compiler_options", lambda device: {"xla_no_such_option": True}
    )
    graph, params = transformer.build_abstract_model(tiny_config())
    prefill, _ = sampling.programs_for(device)
    sampling.programs_for.cache_clear()
    tokens, lengths = (jax.ShapeDtypeStruct(shape, "int32") for shape in ((2, 4), (2,)))
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="No such compile option: 'xla_no_such_option'"
    ):
        prefill.lower(graph, Variables(params, {}), tokens, lengths, 4).compile()
