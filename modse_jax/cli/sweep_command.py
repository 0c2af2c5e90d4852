"""Train every arm of a sweep file that has no result yet:

    python -m modse_jax sweep --sweep=configs/sweeps/micro_rates.py --workdir=sweeps/micro_rates

The same command again resumes. With --dry_run, it prints the arms and what they would cost. With
--launcher=slurm, it submits jobs that train them, and ends.
"""

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
    flags.DEFINE_enum(
        "launcher", "local", ["local", "slurm"], "Train on this machine, or in jobs of Slurm."
    )
    flags.DEFINE_integer(
        "jobs", 1, "The number of Slurm jobs, which share the runs.", lower_bound=1
    )
    flags.DEFINE_multi_string(
        "slurm",
        [],
        "An option of sbatch for each job, such as --slurm=partition=gpu; may be repeated. The "
        "time limit, --slurm=time=MINUTES, is required.",
    )
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
    from modse_jax.sweeps import dry_run, planning, runner, slurm
    from modse_jax.sweeps.results import SweepDirectory

    is_slurm = FLAGS.launcher == "slurm"
    if not is_slurm and (FLAGS.slurm or FLAGS.jobs != 1):
        raise UserError("--jobs and --slurm are for jobs of Slurm; add --launcher=slurm")
    loaded = planning.load_sweep(FLAGS.sweep)
    directory = SweepDirectory(FLAGS.workdir) if FLAGS.workdir else None
    if FLAGS.dry_run:
        print(dry_run.describe_sweep(loaded.arms, directory, FLAGS.flops_per_second))
        return ExitCode.FINISHED
    if directory is None:
        raise UserError("--workdir is missing; name a directory for the sweep (or --dry_run)")
    if is_slurm:
        options = slurm.parse_options(FLAGS.slurm)
        slurm.check_installed()
        return slurm.launch(directory, FLAGS.sweep, loaded, FLAGS.jobs, options, FLAGS.retry)
    return runner.run_sweep(directory, planning.sweep_name(FLAGS.sweep), loaded, FLAGS.retry)
