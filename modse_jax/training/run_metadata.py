"""The metadata that a run saves with every checkpoint, and its check when a run resumes."""

import base64
from typing import Any

from jax.sharding import Mesh

from modse_jax.config.loading import to_saved
from modse_jax.config.options import Config
from modse_jax.data import tokenizers, training_data
from modse_jax.errors import UserError
from modse_jax.runtime import processes


def build_metadata(config: Config, data: training_data.TrainingData, mesh: Mesh) -> dict[str, Any]:
    """Returns the metadata of a run's checkpoints.

    Two values are filled in later: "skipped_data", which is [step, number of skipped batches] for
    every rewind, and "validation_loss", the loss of the saved step.
    """
    return {
        "config": to_saved(config),
        "data": data.fingerprint,
        "tokenizer": tokenizers.fingerprint(data.tokenizer),
        "tokenizer_model": base64.b64encode(data.tokenizer.serialize()).decode(),
        "validation_sets": data.set_fingerprints,
        "independent_seeds": data.has_independent_seeds,
        "cards": [dataset.card for dataset in (*data.datasets, *data.validation_sets)],
        "code": processes.source_digest(),
        "devices": mesh.size,
        "skipped_data": [],
        "validation_loss": None,
    }


def check_same_run(config: Config, expected: dict, step: int, saved: dict) -> None:
    """Checks that a checkpoint was trained on the data of this run and, if necessary, on its mesh.

    Args:
      config: the config of this run.
      expected: metadata of this run.
      step: the step of the checkpoint.
      saved: metadata of the checkpoint.

    Raises:
      UserError: the data, a validation set or the tokenizer differs, or the number of devices does
        and the result of training depends on it.
    """
    for name in ("tokenizer", "data"):
        if saved[name] != expected[name]:
            raise UserError(
                f"checkpoint {step} was trained with other data ({name} {saved[name]!r}), now "
                f"{expected[name]!r}; restore the data it was trained on, or use another --workdir"
            )
    check_same_sets(expected["validation_sets"], step, saved)
    is_finished = step >= config.training.steps
    if config.depends_on_mesh and not is_finished and saved["devices"] != expected["devices"]:
        # The options of the mesh are those of the saved run, and one of them is -1.
        raise UserError(
            f"checkpoint {step} was trained on {saved['devices']} devices, and the mesh options "
            f"now give {expected['devices']}, but the result of training depends on which tokens "
            "share a device (moe.capacity_factor above 0, or moe.balance_loss_scope=device); "
            f"resume on {saved['devices']} devices, or use another --workdir"
        )


def check_same_sets(expected: dict[str, str], step: int, saved: dict) -> None:
    """Checks that a checkpoint was validated on the validation sets of this run.

    Args:
      expected: {name: fingerprint} of the validation sets of this run.
      step: the step of the checkpoint.
      saved: metadata of the checkpoint.

    Raises:
      UserError: a set differs.
    """
    before = saved.get("validation_sets", {})  # checkpoints of older versions lack it
    for name in sorted(before.keys() | expected.keys()):
        if before.get(name) != expected.get(name):
            raise UserError(
                f"validation set {name!r} is not the one of checkpoint {step} (fingerprint "
                f"{before.get(name)}, now {expected.get(name)}); restore the data that the run "
                "began with, or use another --workdir"
            )
