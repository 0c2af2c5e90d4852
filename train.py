"""Train a model: python train.py --config=configs/tiny.py --workdir=runs/tiny [--config.training.steps=200 ...]"""
from absl import flags
from ml_collections import config_flags

from modse_jax import command_line
from modse_jax.config import from_dict

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/; --config.section.option=value overrides.",
                                         lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept; the same workdir again resumes it.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> int:
    config = from_dict(command_line.config_values(CONFIG))
    from modse_jax import mesh  # before the first use of a device: this may set XLA flags
    mesh.request_determinism(config)
    from modse_jax.evaluation import report
    from modse_jax.training import loop
    code = loop.train(config, WORKDIR.value)
    report.write(WORKDIR.value)
    return code


if __name__ == "__main__":
    command_line.run(main)
