"""Write the report of a sweep, which compares its arms, into WORKDIR/report/index.html:

    python -m modse_jax report --workdir=sweeps/micro_rates

It can be written at any time, also while the sweep runs.
"""

import sys

from absl import flags

from modse_jax.cli import command_line
from modse_jax.errors import ExitCode, UserError
from modse_jax.report.comparison.metrics import METRICS

FLAGS = flags.FLAGS


def run() -> None:
    """Runs the command `report` with the flags of the command line, and exits."""
    command_line.run(report, define_flags, __doc__)


def define_flags() -> None:
    """Defines the flags of `report`."""
    flags.DEFINE_string("workdir", None, "The directory of the sweep.")
    flags.DEFINE_enum("metric", "validation_loss", list(METRICS), "The loss that is compared.")
    flags.DEFINE_string(
        "baseline", "", "The shape that others are compared with; by default the dense one."
    )
    flags.DEFINE_float(
        "shared_rate",
        0,
        "The shared learning rate; 0 = the one at which most shapes have finished.",
        lower_bound=0,
    )
    flags.mark_flag_as_required("workdir")


def report() -> int:
    """Writes the report of a sweep. Returns the exit code."""
    # Imported here because these modules are slow to import.
    from modse_jax.report.comparison import page
    from modse_jax.sweeps.results import SweepDirectory

    if not FLAGS.workdir:
        raise UserError("--workdir is empty; name the directory of a sweep")
    options = page.ReportOptions(FLAGS.metric, FLAGS.baseline, FLAGS.shared_rate)
    written = page.write_report(SweepDirectory(FLAGS.workdir), options)
    for warning in written.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"written: {written.page}")
    return ExitCode.FINISHED
