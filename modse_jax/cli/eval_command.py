"""Evaluate a checkpoint:

    python eval.py --workdir=runs/tiny [--step=N] [--suite=loss,routing,sample] [--limit=N]

draw the paper's analyses:

    python eval.py --workdir=runs/tiny --suite=analysis [--baselines=runs/tiny_baseline]

run benchmarks:

    python eval.py --workdir=runs/tiny --suite=tasks --tasks=piqa,mmlu [--tasks_dir=DIR] [--limit=N]

run and compare benchmarks (or, with --suite=compare, compare the results of earlier runs):

    python eval.py --workdirs=runs/a,runs/b --suite=tasks --tasks=...

or verify the hashes of every checkpoint:

    python eval.py --workdir=runs/tiny --suite=verify
"""

from absl import flags

from modse_jax.cli import command_line
from modse_jax.errors import ExitCode, UserError

FLAGS = flags.FLAGS

# Suites that cannot be combined with others.
EXCLUSIVE_SUITES = {"tasks", "compare", "analysis", "verify"}


def run() -> None:
    """Runs the command `eval` with the flags of the command line, and exits."""
    command_line.run(evaluate, define_flags, __doc__)


def define_flags() -> None:
    """Defines the flags of `eval`."""
    flags.DEFINE_string("workdir", None, "The workdir of a training run.")
    flags.DEFINE_list("workdirs", [], "Several workdirs, for the suites tasks and compare.")
    flags.DEFINE_integer("step", 0, "A saved step; 0 for the newest.", lower_bound=0)
    flags.DEFINE_list("suite", ["loss", "routing", "sample"], "The suites to run.")
    flags.DEFINE_integer(
        "limit", 0, "Validation records, or documents of a task; 0 for all.", lower_bound=0
    )
    flags.DEFINE_integer(
        "batch_size",
        0,
        "Sequences per batch; 0 for evaluation.batch_size, and in suite tasks for as many as fit "
        "into memory.",
        lower_bound=0,
    )
    flags.DEFINE_multi_string("prompt", [], "Prompt of the sample suite; may be repeated.")
    flags.DEFINE_string(
        "prompt_file", "", "A text file that is one more prompt of the sample suite."
    )
    flags.DEFINE_list(
        "baselines",
        [],
        "Workdirs of dense or equal-width runs on the same data, for suite analysis.",
    )
    flags.DEFINE_integer(
        "earlier",
        0,
        "The step that suite analysis compares with; 0 for the oldest.",
        lower_bound=0,
    )
    flags.DEFINE_list(
        "tasks",
        [],
        "Benchmarks of suite tasks, by their names in configs/tasks/ or in lm-evaluation-harness.",
    )
    flags.DEFINE_string(
        "tasks_dir",
        "",
        "A folder with task files (YAML), and with data that replaces the data of the Hugging Face "
        "hub, for machines without internet access.",
    )


def evaluate() -> int:
    """Runs the evaluations that --suite names. Returns the exit code."""
    suites = list(FLAGS.suite)
    exclusive = EXCLUSIVE_SUITES & set(suites)
    if exclusive and len(suites) > 1:
        raise UserError(
            f"--suite={','.join(suites)}: {', '.join(sorted(exclusive))} must stand alone; loss, "
            "routing and sample may be combined"
        )
    if suites == ["tasks"]:
        return _run_tasks()
    if suites == ["compare"]:
        return _compare_tasks()
    if FLAGS.workdirs or not FLAGS.workdir:
        raise UserError("give --workdir=DIR; --workdirs is for the suites tasks and compare")
    if suites == ["verify"]:
        return _verify()
    if suites == ["analysis"]:
        return _analyze()
    return _score()


def _score() -> int:
    from modse_jax.evaluation import scoring
    from modse_jax.report import pages
    from modse_jax.runtime import processes

    prompts = (*FLAGS.prompt, *_prompts_from_file())
    if not all(prompts):
        raise UserError("--prompt or --prompt_file is empty; give some text")
    scoring.evaluate(
        FLAGS.workdir,
        FLAGS.step,
        tuple(FLAGS.suite),
        FLAGS.limit,
        FLAGS.batch_size,
        prompts,
        _show,
    )
    if processes.is_main_process():
        pages.write(FLAGS.workdir)
    return ExitCode.FINISHED


def _verify() -> int:
    from modse_jax.evaluation import model_loading

    text, all_sound = model_loading.verify_checkpoints(FLAGS.workdir)
    print(text)
    return ExitCode.FINISHED if all_sound else ExitCode.FAILED


def _analyze() -> int:
    from modse_jax.report import analysis, pages

    summary = analysis.write(
        FLAGS.workdir,
        FLAGS.step,
        tuple(FLAGS.baselines),
        FLAGS.earlier,
        FLAGS.limit,
        FLAGS.batch_size,
    )
    print(summary)
    pages.write(FLAGS.workdir)
    return ExitCode.FINISHED


def _run_tasks() -> int:
    from modse_jax.evaluation.benchmarks import task_runner

    workdirs = _workdirs()
    task_runner.run_tasks(
        workdirs,
        FLAGS.step,
        tuple(FLAGS.tasks),
        FLAGS.tasks_dir,
        FLAGS.limit,
        FLAGS.batch_size,
        _show,
    )
    if len(workdirs) > 1:
        _print_comparison(workdirs)
    return ExitCode.FINISHED


def _compare_tasks() -> int:
    workdirs = _workdirs()
    if len(workdirs) < 2:
        raise UserError("suite compare needs --workdirs=DIR,DIR")
    _print_comparison(workdirs)
    return ExitCode.FINISHED


def _print_comparison(workdirs: tuple[str, ...]) -> None:
    from modse_jax.evaluation.benchmarks import run_comparison
    from modse_jax.runtime import processes

    if processes.is_main_process():
        tasks = tuple(FLAGS.tasks)
        print("\n" + run_comparison.compare_runs(workdirs, FLAGS.step, tasks, FLAGS.limit))


def _workdirs() -> tuple[str, ...]:
    if FLAGS.workdirs and FLAGS.workdir:
        raise UserError("give --workdir=DIR or --workdirs=DIR,DIR")
    if FLAGS.workdirs:
        return tuple(FLAGS.workdirs)
    if FLAGS.workdir:
        return (FLAGS.workdir,)
    raise UserError("give --workdir=DIR or --workdirs=DIR,DIR")


def _show(text: str) -> None:
    from modse_jax.runtime import processes

    if processes.is_main_process():
        print(text, end="", flush=True)


def _prompts_from_file() -> tuple[str, ...]:
    if not FLAGS.prompt_file:
        return ()
    try:
        # Without newline="", line ends would be changed. A byte order mark is no text.
        with open(FLAGS.prompt_file, encoding="utf-8-sig", newline="") as file:
            return (file.read(),)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "not UTF-8")
        raise UserError(f"--prompt_file={FLAGS.prompt_file} cannot be read: {reason}") from None
