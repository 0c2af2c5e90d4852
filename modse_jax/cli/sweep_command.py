"""Train every arm of a sweep file that has no result yet:

    python -m modse_jax sweep --sweep=configs/sweeps/micro_rates.py --workdir=sweeps/micro_rates

The same command again resumes. With --dry_run, it prints the arms and what they would cost.
"""

import pathlib

from absl import flags

from modse_jax.cli import command_line
from modse_jax.errors import ExitCode, UserError

FLAGS = flags.FLAGS


def run() -> None:
    """Runs the command `sweep` with the flags of the command line, and exits."""
    command_line.run(sweep, define_flags, __doc__)


def define_flags() -> None:
    """Defines the flags of `sweep`."""
    flags.DEFINE_string("sweep", None, "A file of configs/sweeps/.")
    flags.DEFINE_string(
        "workdir", None, "The directory of the sweep; the same workdir again resumes it."
    )
    flags.DEFINE_enum("launcher", "local", ["local"], "Where runs are trained.")
    flags.DEFINE_bool("dry_run", False, "Print the arms and what they would cost, and exit.")
    flags.DEFINE_enum("retry", "", ["", "failed"], "Train runs that failed earlier once more.")
    flags.DEFINE_float(
        "flops_per_second",
        0,
        "The speed that --dry_run assumes; 0 = that of runs in the workdir, or 40% of the peak of "
        "this machine.",
        lower_bound=0,
    )
    flags.mark_flag_as_required("sweep")


def sweep() -> int:
    """Trains the arms of a sweep, or describes them. Returns the exit code."""
    # Imported here because these modules are slow to import.
    from modse_jax.runtime import signals

    signals.exit_on_stop_signals()
    from modse_jax.sweeps import dry_run, planning, runner
    from modse_jax.sweeps.results import SweepDirectory

    loaded = planning.load_sweep(FLAGS.sweep)
    directory = SweepDirectory(FLAGS.workdir) if FLAGS.workdir else None
    if FLAGS.dry_run:
        print(dry_run.describe_sweep(loaded.arms, directory, FLAGS.flops_per_second))
        return ExitCode.FINISHED
    if directory is None:
        raise UserError("--workdir is missing; name a directory for the sweep (or --dry_run)")
    return runner.run_sweep(directory, pathlib.Path(FLAGS.sweep).stem, loaded, FLAGS.retry)
