"""Train a model: python train.py --config=configs/tiny.py --workdir=runs/tiny [--config.training.steps=200 ...]
or plan for hardware that is not there: python train.py --config=... --plan=v5e:4x4,v5p:2x2x4 [--plan_json=FILE]"""

from absl import flags
from ml_collections import config_flags

from modse_jax import cli
from modse_jax.config.loading import from_dict
from modse_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/; --config.section.option=value overrides.", lock_config=True
)


WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run is kept; the same workdir again resumes it."
)


PLAN = flags.DEFINE_list("plan", [], "Compile the step for these topologies, report, and exit.")


PLAN_JSON = flags.DEFINE_string("plan_json", "", "A file for the plan's rows.")


flags.mark_flag_as_required("config")


def main() -> int:
    config = from_dict(cli.config_values(CONFIG))
    if PLAN.value:
        return _plan(config)
    if not WORKDIR.value:
        raise UserError("--workdir is missing; name a directory for the run (or --plan=TOPOLOGY)")
    cli.leave_on_signals()
    from modse_jax.config import device_mesh
    from modse_jax.report import pages
    from modse_jax.runtime import processes
    from modse_jax.training import loop  # before the first use of a device: this may set XLA flags

    device_mesh.request_determinism(config)
    code = loop.train(config, WORKDIR.value)
    if processes.is_main_process():
        pages.write(WORKDIR.value)
    return code


def _plan(config):
    from modse_jax.planning import planner

    planner.check(PLAN.value, PLAN_JSON.value)
    planner.prepare_environment(PLAN.value)
    rows = [planner.plan(config, name) for name in PLAN.value]
    print(planner.table(rows))
    if PLAN_JSON.value:
        planner.write_json(rows, PLAN_JSON.value)
    return 0


if __name__ == "__main__":
    cli.run(main)
