"""Train a model:

    python train.py --config=configs/tiny.py --workdir=runs/tiny [--config.training.steps=200 ...]

or compile its step for other hardware and report memory and time, without that hardware:

    python train.py --config=... --plan=v5e:4x4,v5p:2x2x4 [--plan_json=FILE]
"""

from absl import flags

from modse_jax.cli import command_line, config_file
from modse_jax.config.loading import from_dict
from modse_jax.config.options import Config
from modse_jax.errors import ExitCode, UserError

FLAGS = flags.FLAGS


def run() -> None:
    """Runs the command `train` with the flags of the command line, and exits."""
    command_line.run(train, define_flags, __doc__)


def run_plan() -> None:
    """Runs the command `plan`, which is `train` with --plan as a required flag, and exits."""
    command_line.run(plan, define_flags, __doc__)


def define_flags() -> None:
    """Defines the flags of `train` and `plan`."""
    config_file.define_flag("A file of configs/; --config.section.option=value overrides.")
    flags.DEFINE_string(
        "workdir", None, "The directory of the run; the same workdir again resumes it."
    )
    flags.DEFINE_list("plan", [], "Compile the step for these topologies, report, and exit.")
    flags.DEFINE_string("plan_json", "", "A file for the rows of the plan.")
    flags.mark_flag_as_required("config")


def train() -> int:
    """Trains a model, or plans a training step if --plan is given. Returns the exit code."""
    config = from_dict(command_line.config_values("config"))
    if FLAGS.plan:
        return _plan(config)
    if not FLAGS.workdir:
        raise UserError("--workdir is missing; name a directory for the run (or --plan=TOPOLOGY)")
    # Imported here because these modules are slow to import and planning must first set
    # environment variables.
    from modse_jax.runtime import signals

    signals.exit_on_stop_signals()
    from modse_jax.config import device_mesh
    from modse_jax.report import pages
    from modse_jax.runtime import processes
    from modse_jax.training import loop

    device_mesh.request_determinism(config)  # before the first use of a device
    code = loop.train(config, FLAGS.workdir)
    if processes.is_main_process():
        pages.write(FLAGS.workdir)
    return code


def plan() -> int:
    """Plans a training step for the topologies of --plan. Returns the exit code."""
    if not FLAGS.plan:
        raise UserError("--plan is missing; name topologies, such as --plan=v5e:4x4,v5p:2x2x4")
    return _plan(from_dict(command_line.config_values("config")))


def _plan(config: Config) -> int:
    from modse_jax.planning import plan_table, planner

    planner.check_arguments(FLAGS.plan, FLAGS.plan_json)
    planner.prepare_environment(FLAGS.plan)
    rows = [planner.plan_step(config, topology) for topology in FLAGS.plan]
    print(plan_table.format_table(rows))
    if FLAGS.plan_json:
        planner.write_json(rows, FLAGS.plan_json)
    return ExitCode.FINISHED
