"""Train a model: python train.py --config=configs/tiny.py --workdir=runs/tiny [--config.training.steps=200 ...]
or plan for hardware that is not there: python train.py --config=... --plan=v5e:4x4,v5p:2x2x4 [--plan_json=FILE]"""
from absl import flags
from ml_collections import config_flags

from modse_jax import command_line
from modse_jax.config import UserError, from_dict

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/; --config.section.option=value overrides.",
                                         lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept; the same workdir again resumes it.")
PLAN = flags.DEFINE_list("plan", [], "Compile the step for these topologies, report, and exit.")
PLAN_JSON = flags.DEFINE_string("plan_json", "", "A file for the plan's rows.")
flags.mark_flag_as_required("config")


def main() -> int:
    config = from_dict(command_line.config_values(CONFIG))
    if PLAN.value:
        return _plan(config)
    if not WORKDIR.value:
        raise UserError("--workdir is missing; name a directory for the run (or --plan=TOPOLOGY)")
    command_line.leave_on_signals()
    from modse_jax import mesh, processes  # before the first use of a device: this may set XLA flags
    mesh.request_determinism(config)
    from modse_jax.evaluation import report
    from modse_jax.training import loop
    code = loop.train(config, WORKDIR.value)
    if processes.first():
        report.write(WORKDIR.value)
    return code


def _plan(config):
    from modse_jax.training import plan
    plan.check(PLAN.value, PLAN_JSON.value)
    plan.prepare_environment(PLAN.value)
    rows = [plan.plan(config, name) for name in PLAN.value]
    print(plan.table(rows))
    if PLAN_JSON.value:
        plan.write_json(rows, PLAN_JSON.value)
    return 0


if __name__ == "__main__":
    command_line.run(main)
