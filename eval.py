"""Evaluate a checkpoint: python eval.py --workdir=runs/tiny [--step=N] [--suite=loss,routing,sample] [--limit=N]
or draw the paper's analyses: python eval.py --workdir=runs/tiny --suite=analysis [--baselines=runs/tiny_baseline]
or run benchmarks: python eval.py --workdir=runs/tiny --suite=tasks --tasks=piqa,mmlu [--tasks_dir=DIR] [--limit=N]
or run and compare them: python eval.py --workdirs=runs/a,runs/b --suite=tasks --tasks=...; again, only to look: compare
or check every checkpoint's hashes: python eval.py --workdir=runs/tiny --suite=verify"""

from absl import flags

from modse_jax import cli
from modse_jax.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "A directory that train.py has filled.")


WORKDIRS = flags.DEFINE_list("workdirs", [], "Several of them, for suites tasks and compare.")


STEP = flags.DEFINE_integer("step", 0, "A saved step; 0 for the newest.", lower_bound=0)


SUITE = flags.DEFINE_list("suite", ["loss", "routing", "sample"], "What to run.")


LIMIT = flags.DEFINE_integer(
    "limit", 0, "Validation records, or documents of a task; 0 for all.", lower_bound=0
)


BATCH = flags.DEFINE_integer(
    "batch_size",
    0,
    "Sequences per batch; 0 for evaluation.batch_size, and for tasks for what memory holds.",
    lower_bound=0,
)


PROMPT = flags.DEFINE_multi_string("prompt", [], "Prompt of the sample suite; may be repeated.")


PROMPT_FILE = flags.DEFINE_string(
    "prompt_file", "", "A text file that is one more prompt of the sample suite."
)


BASELINES = flags.DEFINE_list(
    "baselines", [], "Workdirs of equal-width runs on the same data, for suite analysis."
)


EARLIER = flags.DEFINE_integer(
    "earlier", 0, "The step that suite analysis compares with; 0: the oldest.", lower_bound=0
)


TASKS = flags.DEFINE_list(
    "tasks",
    [],
    "Benchmarks of suite tasks, by their names in configs/tasks/ or in lm-evaluation-harness.",
)


TASKS_DIR = flags.DEFINE_string(
    "tasks_dir",
    "",
    "A folder with task files (YAML), and data that takes the place of "
    "the hub's: for machines without internet.",
)


def main() -> int:
    from modse_jax.evaluation import model_loading, scoring
    from modse_jax.report import analysis, pages
    from modse_jax.runtime import processes

    alone = {"tasks", "compare", "analysis", "verify"} & set(SUITE.value)
    if alone and len(SUITE.value) > 1:
        raise UserError(
            f"--suite={','.join(SUITE.value)}: {', '.join(sorted(alone))} must stand alone; loss, routing "
            "and sample may be combined"
        )
    if SUITE.value in (["tasks"], ["compare"]):
        return _tasks()
    if WORKDIRS.value or not WORKDIR.value:
        raise UserError("give --workdir=DIR; --workdirs is for the suites tasks and compare")
    if SUITE.value == ["verify"]:
        text, sound = model_loading.verify_checkpoints(WORKDIR.value)
        print(text)
        return 0 if sound else 1
    if SUITE.value == ["analysis"]:
        print(
            analysis.write(
                WORKDIR.value,
                STEP.value,
                tuple(BASELINES.value),
                EARLIER.value,
                LIMIT.value,
                BATCH.value,
            )
        )
        pages.write(WORKDIR.value)
        return 0
    prompts = tuple(PROMPT.value) + _from_file()
    if not all(prompts):
        raise UserError("--prompt or --prompt_file is empty; give some text")
    scoring.evaluate(
        WORKDIR.value, STEP.value, tuple(SUITE.value), LIMIT.value, BATCH.value, prompts, _show
    )
    if processes.is_main_process():
        pages.write(WORKDIR.value)
    return 0


def _tasks():
    from modse_jax.evaluation.benchmarks import run_comparison, task_runner
    from modse_jax.runtime import processes

    workdirs = tuple(WORKDIRS.value or filter(None, [WORKDIR.value]))
    if not workdirs or (WORKDIRS.value and WORKDIR.value):
        raise UserError("give --workdir=DIR or --workdirs=DIR,DIR")
    if SUITE.value == ["tasks"]:
        task_runner.run_tasks(
            workdirs,
            STEP.value,
            tuple(TASKS.value),
            TASKS_DIR.value,
            LIMIT.value,
            BATCH.value,
            _show,
        )
    elif len(workdirs) < 2:
        raise UserError("suite compare needs --workdirs=DIR,DIR")
    if len(workdirs) > 1 and processes.is_main_process():
        print(
            "\n"
            + run_comparison.compare_runs(workdirs, STEP.value, tuple(TASKS.value), LIMIT.value)
        )
    return 0


def _show(text):
    from modse_jax.runtime import processes

    if processes.is_main_process():
        print(text, end="", flush=True)


def _from_file():
    if not PROMPT_FILE.value:
        return ()
    try:
        with open(PROMPT_FILE.value, encoding="utf-8") as file:
            return (file.read(),)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompt_file={PROMPT_FILE.value} cannot be read: {getattr(error, 'strerror', 'not UTF-8')}"
        ) from None


if __name__ == "__main__":
    cli.run(main)
