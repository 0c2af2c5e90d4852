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
        "cards": [dataset.card for dataset in data.datasets],
        "code": processes.source_digest(),
        "devices": mesh.size,
        "skipped_data": [],
        "validation_loss": None,
    }


def check_same_data(expected: dict, step: int, saved: dict) -> None:
    """Checks that a checkpoint was trained on the data of this run.

    Args:
      expected: metadata of this run.
      step: the step of the checkpoint.
      saved: metadata of the checkpoint.

    Raises:
      UserError: the data or the tokenizer differs.
    """
    for name in ("tokenizer", "data"):
        if saved[name] != expected[name]:
            raise UserError(
                f"checkpoint {step} was trained with other data ({name} {saved[name]!r}), now "
                f"{expected[name]!r}; restore the data it was trained on, or use another --workdir"
            )
