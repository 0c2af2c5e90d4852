"""Opens a trained model for evaluation: its config, its data and the arrays of a checkpoint."""

import dataclasses
import pathlib
import sys
from typing import NamedTuple

import jax

from modse_jax.config.loading import from_saved
from modse_jax.config.options import Config
from modse_jax.data import tokenizers, training_data
from modse_jax.errors import UserError
from modse_jax.model import kernel_selection
from modse_jax.model.variables import Variables
from modse_jax.runtime import files, processes, sharding
from modse_jax.training import run_metadata, train_step
from modse_jax.training.checkpointing import Checkpoints


class LoadedModel(NamedTuple):
    """A trained model and the data it was trained on.

    Attributes:
        config: The config of the run, but with plain XLA backends if this device has no kernels
            that pass their self-test.
        data: The prepared training and validation data.
        mesh: The devices over which batches are sharded; parameters are replicated.
        step: The training step of the checkpoint.
        variables: The arrays of the model, replicated on every device of the mesh.
    """

    config: Config
    data: training_data.TrainingData
    mesh: jax.sharding.Mesh
    step: int
    variables: Variables


def read_config(workdir: pathlib.Path) -> Config:
    """Returns the config of a run from `config.json`, which is data and is never executed.

    Raises:
        UserError: The directory holds no run, or its config is invalid.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(
            f"--workdir={workdir} holds no run (no config.json); train one with train.py"
        )
    try:
        return from_saved(files.read_json(path))
    except (ValueError, UserError) as error:
        raise UserError(f"{path}: {error}") from None


def load_model(workdir: pathlib.Path, step: int, batch_size: int) -> LoadedModel:
    """Loads the model of a checkpoint and the data of its run.

    Args:
        workdir: The directory of the run.
        step: A saved step; 0 for the newest.
        batch_size: Sequences per batch, sharded over the largest number of devices that divides it.

    Raises:
        UserError: The step is not saved or is damaged, or the data is not that of the run.
    """
    mesh = sharding.build_batch_mesh(batch_size)
    config = replace_wrong_kernels(read_config(workdir), mesh)
    checkpoints = open_checkpoints(workdir)
    data = processes.on_all_processes(lambda: training_data.load(config, workdir), first_alone=True)
    fingerprints = {
        "data": data.fingerprint,
        "tokenizer": tokenizers.fingerprint(data.tokenizer),
    }
    step = find_valid_step(checkpoints, workdir, step, fingerprints, data.set_fingerprints)
    state, damage = checkpoints.restore(step, _state_shapes(config, mesh))
    checkpoints.close()
    if damage:
        raise UserError(_describe_damage(step, damage))
    return LoadedModel(config, data, mesh, step, state.variables)


def _state_shapes(config: Config, mesh: jax.sharding.Mesh) -> train_step.State:
    """Returns the shapes and dtypes of the training state, replicated over the mesh."""
    replicated = sharding.replicated(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        jax.eval_shape(lambda: train_step.init_state(config)),
    )


def _describe_damage(step: int, reason: str) -> str:
    return f"checkpoint {step} is damaged: {reason}; name another with --step"


def replace_wrong_kernels(config: Config, mesh: jax.sharding.Mesh) -> Config:
    """Tests the kernels of a config on this device; returns a config that works on it.

    If a kernel fails its self-test, it is replaced by plain XLA backends and a warning is printed,
    because an evaluation is still useful if it is slower. Training raises an error instead.
    """
    try:
        processes.on_all_processes(
            lambda: kernel_selection.check_kernels(kernel_selection.for_evaluation(config), mesh)
        )
    except UserError as error:
        print(
            f"{error}; this evaluation uses moe.backend=blocked and model.attention=blocks",
            file=sys.stderr,
        )
        return dataclasses.replace(
            config,
            moe=dataclasses.replace(config.moe, backend="blocked"),
            model=dataclasses.replace(config.model, attention="blocks"),
        )
    return config


def open_checkpoints(workdir: pathlib.Path) -> Checkpoints:
    """Opens the checkpoints of a run, read-only.

    Raises:
        UserError: No checkpoint has been saved.
    """
    directory = workdir / "checkpoints"
    if directory.is_dir():
        checkpoints = Checkpoints(directory, read_only=True)
        if checkpoints.steps():
            return checkpoints
    raise UserError(f"{workdir} holds no checkpoint yet")


def find_valid_step(
    checkpoints: Checkpoints,
    workdir: pathlib.Path,
    step: int,
    fingerprints: dict[str, str],
    set_fingerprints: dict[str, str],
) -> int:
    """Returns the requested step, or the newest undamaged one if 0 is requested.

    Args:
        checkpoints: The checkpoints of the run.
        workdir: The directory of the run, for error messages.
        step: The requested step; 0 for the newest.
        fingerprints: {"data": ..., "tokenizer": ...}, the fingerprints of what has been loaded.
            Those in the metadata of the checkpoint must be equal.
        set_fingerprints: The same of the validation sets, by name.

    Raises:
        UserError: The step is not saved, is damaged, or was trained on other data.
    """

    def check_data(number: int, meta: dict) -> None:
        for name, value in fingerprints.items():
            if meta[name] != value:
                raise UserError(
                    f"checkpoint {number} was trained with other data ({name} {meta[name]!r}), now "
                    f"{value!r}; restore the data it was trained on"
                )
        run_metadata.check_same_sets(set_fingerprints, number, meta)

    if not step:
        found = checkpoints.newest(check_data)
        for number, reason in found.damaged:
            print(
                f"checkpoint {number} is damaged ({reason}); evaluating step {found.step}",
                file=sys.stderr,
            )
        return found.step
    saved = checkpoints.steps()
    if step not in saved:
        listed = ", ".join(map(str, saved))
        raise UserError(f"--step={step} is not saved in {workdir}; saved: {listed}")
    damage = processes.broadcast_from_main(lambda: checkpoints.verify(step))
    if damage:
        raise UserError(_describe_damage(step, damage))
    check_data(step, checkpoints.meta(step))
    return step


def verify_checkpoints(workdir: str) -> tuple[str, bool]:
    """Compares every file of every checkpoint with its recorded hash.

    Returns:
        The text to print, one line per checkpoint; and True if all checkpoints are intact.
    """
    directory = pathlib.Path(workdir).expanduser().absolute()
    checkpoints = open_checkpoints(directory)
    lines = []
    all_intact = True
    for step in checkpoints.steps():
        damage = checkpoints.verify(step)
        status = f"damaged: {damage}" if damage else "good"
        lines.append(f"step {step:8}  {status}")
        all_intact = all_intact and not damage
    return "\n".join(lines), all_intact
