"""Chooses the subcommand of `python -m modse_jax`."""

import runpy
import sys
from collections.abc import Callable

from modse_jax.errors import ExitCode

PROGRAM = "python -m modse_jax"

USAGE = f"""\
usage: {PROGRAM} COMMAND [--help] [--option=value ...]

commands:
  train            train a model, or resume its training (the same as train.py)
  plan             compile the training step for other hardware; needs --plan=TOPOLOGY
  sweep            train many configs of one sweep file, or resume them
  report           compare the runs of a sweep on one page
  eval             evaluate a checkpoint (the same as eval.py)
  prepare          turn text into a dataset of token records
  inspect          look at prepared data
  train_tokenizer  train a tokenizer on text
"""


def main() -> None:
    """Runs the subcommand that the command line names, and exits with its exit code."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(USAGE, end="")
        sys.exit(ExitCode.FINISHED if arguments else ExitCode.BAD_INPUT)
    name = arguments[0]
    if name not in COMMANDS:
        print(f"error: {name!r} is not a command; commands: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(ExitCode.BAD_INPUT)
    sys.argv = [f"{PROGRAM} {name}", *arguments[1:]]
    COMMANDS[name]()


# The module of a command is imported only when the command runs, because some are slow to import.


def _train() -> None:
    from modse_jax.cli import train_command

    train_command.run()


def _plan() -> None:
    from modse_jax.cli import train_command

    train_command.run_plan()


def _sweep() -> None:
    from modse_jax.cli import sweep_command

    sweep_command.run()


def _report() -> None:
    from modse_jax.cli import report_command

    report_command.run()


def _eval() -> None:
    from modse_jax.cli import eval_command

    eval_command.run()


def _prepare() -> None:
    runpy.run_module("modse_jax.data.prepare", run_name="__main__", alter_sys=True)


def _inspect() -> None:
    runpy.run_module("modse_jax.data.inspect", run_name="__main__", alter_sys=True)


def _train_tokenizer() -> None:
    runpy.run_module("modse_jax.data.train_tokenizer", run_name="__main__", alter_sys=True)


COMMANDS: dict[str, Callable[[], None]] = {
    "train": _train,
    "plan": _plan,
    "sweep": _sweep,
    "report": _report,
    "eval": _eval,
    "prepare": _prepare,
    "inspect": _inspect,
    "train_tokenizer": _train_tokenizer,
}
