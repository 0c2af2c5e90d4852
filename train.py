"""Trains a model: python train.py --config=configs/tiny.py --workdir=runs/tiny

The same as `python -m modse_jax train`; --help lists the options.
"""

from modse_jax.cli import train_command

if __name__ == "__main__":
    train_command.run()
