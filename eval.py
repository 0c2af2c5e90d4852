"""Evaluates a checkpoint: python eval.py --workdir=runs/tiny

The same as `python -m modse_jax eval`; --help lists the options.
"""

from modse_jax.cli import eval_command

if __name__ == "__main__":
    eval_command.run()
