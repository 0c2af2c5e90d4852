"""Complete benchmarks on small files: prompts, results, comparison and invalid input."""

import json
import pathlib
import tempfile

import lm_eval
import lm_eval.tasks
import lm_eval.tasks._index
import numpy as np
import pytest

from modse_jax.errors import RunError, UserError
from modse_jax.evaluation import result_files
from modse_jax.evaluation.benchmarks import (
    harness_adapter,
    run_comparison,
    task_files,
    task_runner,
)
from tests.helpers import benchmark_files
from tests.helpers.configs import tiny_config
from tests.helpers.runs import save_untrained_run

FAMILIES = ("agieval", "mmlu", "gsm8k", "lambada", "math", "triviaqa", "piqa", "siqa")
OTHERS = ("piqa_generated", "siqa_generated", "intent")
ALL_TASKS = (*FAMILIES, *OTHERS)


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)])
def harness(request, monkeypatch):
    """The harness with some of its task folders; a slow variant of a test has all of them.

    The harness reads its thousands of task files in 17 seconds.
    """
    if request.param:
        return
    harness_folder = pathlib.Path(lm_eval.tasks.__file__).parent
    build = lm_eval.tasks._index.TaskIndex.build

    def build_from_some(self, paths):
        assert paths[0] == harness_folder  # later folders override it
        some = [harness_folder / "piqa", harness_folder / "super_glue"]
        return build([*some, *paths[1:]])

    monkeypatch.setattr(lm_eval.tasks._index.TaskIndex, "build", build_from_some)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a small file of every benchmark."""
    root = tmp_path_factory.mktemp("benchmarks")
    benchmark_files.write_all(root)
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs with different expert widths on the same text, as if trained for two steps."""
    root = tmp_path_factory.mktemp("runs")
    (root / "text").mkdir()
    for i in range(24):
        lines = [f"Question: {i} and {n}?\nAnswer: {n}\n" for n in range(40)]
        (root / "text" / f"{i}.txt").write_text("".join(lines))
    workdirs = {}
    for name, widths in (("modse", (20, 4, 12, 12)), ("equal", (12, 12, 12, 12))):
        config = tiny_config(
            model=dict(context_length=128),
            moe=dict(widths=widths),
            data=dict(source=f"text:{root / 'text'}"),
            training=dict(steps=2, checkpoint_every=2),
        )
        workdirs[name] = str(root / name)
        save_untrained_run(config, root / name, step=2)
    return workdirs


def read_results(workdir, limit):
    return json.loads((pathlib.Path(workdir) / "eval" / f"2.first{limit}.json").read_text())


def check_records(records):
    """Checks shots, numbers of documents and metrics of all tasks with a limit of 2."""
    shots = {name: record["shots"] for name, record in records.items()}
    assert shots == {**dict.fromkeys(ALL_TASKS, 5), "gsm8k": 8}
    documents = {name: record["documents"] for name, record in records.items()}
    of_groups = {"mmlu": 57 * 2, "math": 7 * 2, "agieval": 6 * 2}
    assert documents == {**dict.fromkeys(ALL_TASKS, 2), **of_groups}
    metrics = {
        (score["task"], score["metric"])
        for record in records.values()
        for score in record["scores"]
    }
    assert metrics >= {
        ("mmlu", "acc"),
        ("math", "exact_match"),
        ("agieval", "acc"),
        ("piqa", "acc_norm"),
        ("piqa_generated", "exact_match"),
        ("lambada", "perplexity"),
        ("intent", "acc"),
    }


def check_documents(workdir, name, record):
    """Checks that the documents of a task are complete, and that their mean is its accuracy."""
    assert record["seconds"] > 0
    assert record["requests"] >= record["documents"]
    path = result_files.samples_path(pathlib.Path(workdir), 2, 2, name)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({(row["task"], row["document"]) for row in rows}) == record["documents"]
    if "acc" in rows[0]["metrics"]:
        accuracy = next(s["value"] for s in record["scores"] if s["metric"] == "acc")
        assert np.mean([row["metrics"]["acc"] for row in rows]) == pytest.approx(accuracy)


def test_every_family_runs_on_local_files_and_two_runs_compare(trained, data):
    shown = []
    workdirs = tuple(trained.values())
    modse = workdirs[:1]
    (result,) = task_runner.run_tasks(modse, 0, ALL_TASKS, str(data), 2, 0, shown.append)
    written = read_results(modse[0], 2)
    assert written == json.loads(json.dumps(result))
    assert set(written["tasks"]) == set(ALL_TASKS)
    check_records(written["tasks"])
    for name, record in written["tasks"].items():
        check_documents(modse[0], name, record)
    text = "".join(shown)
    assert all(name in text for name in FAMILIES)
    assert "modse, step 2" in text
    compared = ("piqa", "piqa_generated", "lambada")
    results = task_runner.run_tasks(workdirs, 0, compared, str(data), 2, 0)
    assert [set(result["tasks"]) for result in results] == [set(ALL_TASKS), set(compared)]
    table = run_comparison.compare_runs(workdirs, 0, compared, 2)
    assert "piqa_generated" in table
    assert "seconds of computing" in table
    assert "steps modse: 2, equal: 2" in table
    assert "log p" in table
    assert "perplexity" not in table
    # To run one task again keeps the results of the others.
    (again,) = task_runner.run_tasks((trained["modse"],), 2, ("piqa",), str(data), 2, 4)
    assert set(again["tasks"]) == set(ALL_TASKS)


def list_prompts(name, data, limit=3):
    """Returns the arguments of all requests of a task: (context, continuation or options)."""
    manager, (task,) = task_files.load((name,), str(data))
    seen = []

    class Spy(harness_adapter.TemplateLM):
        eot_token_id = 0
        tok_encode = None
        _loglikelihood_tokens = None
        loglikelihood_rolling = None

        def loglikelihood(self, requests, disable_tqdm=False):
            seen.extend(request.args for request in requests)
            return [(0.0, False)] * len(requests)

        def generate_until(self, requests, disable_tqdm=False):
            seen.extend(request.args for request in requests)
            return [""] * len(requests)

    lm_eval.simple_evaluate(
        Spy(), tasks=task.built, task_manager=manager, limit=limit, bootstrap_iters=0
    )
    return seen


def test_piqa_prompts_have_five_other_questions_as_shots(data):
    for context, choice in list_prompts("piqa", data):
        examples, _, question = context.rpartition("\n\n")
        assert examples.count("Question: ") == 5
        assert question.startswith("Question: open")
        assert question.splitlines()[0] not in examples.splitlines()
        assert choice in (" pull", " push")
    for context, _ in list_prompts("piqa_generated", data):
        assert context.endswith("\nA. pull\nB. push\nAnswer:")
        assert context.count("Answer: ") == 5


def test_mmlu_prompts_have_five_shots(data):
    for context, choice in list_prompts("mmlu", data, 1)[:4]:
        assert context.count("Answer:") == 6
        assert '\nB. tw"o\nC. three, four\n' in context
        assert choice in (" A", " B", " C", " D")


def test_agieval_prompts_are_the_publishers(data):
    prompts = list_prompts("agieval", data, 1)
    for context, choice in prompts[:3]:
        assert context.count("A: Among A through C, the answer is (B)y") == 5
        assert choice in (" (A)x", " (B)y", " (C)z")
    cloze = [context for context, _ in prompts if context.endswith("\n\u7b54\u6848\uff1a")]
    assert any(context.count("\u95ee\u9898\uff1a") == 6 for context in cloze)


def test_gsm8k_prompts_have_eight_shots(data):
    for context, options in list_prompts("gsm8k", data):
        assert context.count("Question: ") == 9
        assert context.endswith("?\nAnswer:")
        assert "Question:" in options["until"]


def test_math_prompts_show_intervals_as_text(data):
    for context, _ in list_prompts("math", data, 1):
        assert context.count("Problem: ") == 6
        assert context.count("Answer: [") == 5


def test_lambada_prompts_do_not_contain_the_answer(data):
    for context, word in list_prompts("lambada", data):
        *examples, question = context.split("\n\n")
        assert len(examples) == 5
        assert "  " not in context
        assert word == " word" + question.split()[1]
        assert question + word not in examples


def test_triviaqa_prompts_show_the_answer_and_no_alias(data):
    for context, _ in list_prompts("triviaqa", data):
        assert context.count('Question: Which "') == 6
        assert "no. " not in context
        assert '"?\nAnswer:' in context


def test_siqa_prompts_have_five_shots(data):
    for context, choice in list_prompts("siqa", data)[:3]:
        assert context.count(" met Why?\nA:") == 6
        assert choice in (" a", " b", " c")


def test_a_task_file_in_tasks_dir_runs(trained, harness, tmp_path):
    rows = [{"text": f"t{n}", "label": n % 2} for n in range(9)]
    benchmark_files.write_jsonl(tmp_path / "mine.jsonl", rows)
    (tmp_path / "names.txt").write_text("0\n1\n2\n")
    (tmp_path / "mine.yaml").write_text(
        "include: $tasks/intent.yaml\n"
        "task: mine\n"
        'dataset_kwargs: {file: "$data/mine.jsonl", names: "$data/names.txt"}\n'
        "fewshot_split: test\n"
        "num_fewshot: 2\n"
    )
    prompts = list_prompts("mine", tmp_path)
    assert [choice for _, choice in prompts[:3]] == [" 0", " 1", " 2"]
    assert prompts[0][0].count("Label:") == 3
    (result,) = task_runner.run_tasks((trained["equal"],), 0, ("mine",), str(tmp_path), 0, 0)
    assert result["tasks"]["mine"]["documents"] == 9


def test_without_local_data_tasks_name_the_hub():
    """No `# local` line is left, and the stock data set is requested."""
    harness_folder = pathlib.Path(lm_eval.tasks.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        copies = task_files.copy_task_folders(pathlib.Path(folder), harness_folder, "")
        assert not copies.unreadable
        (ours,) = copies.folders
        paths = list(ours.glob("*.yaml"))
        assert paths
        for path in paths:
            assert path.stem == "intent" or "published_files" not in path.read_text()
        manager = lm_eval.tasks.TaskManager(include_path=ours, include_defaults=False)
        gsm8k = manager.task_index["gsm8k"].cfg
        assert gsm8k["dataset_path"] == "openai/gsm8k"
        assert gsm8k["num_fewshot"] == 8


def read_error(workdir, tasks_dir, *names):
    """Returns the message with which tasks are refused."""
    with pytest.raises(UserError) as error:
        task_runner.run_tasks((str(workdir),), 0, names, str(tasks_dir), 0, 0)
    return str(error.value)


def test_unknown_tasks_are_refused_before_anything_runs(trained, harness, tmp_path):
    run = trained["modse"]
    before = sorted(pathlib.Path(run, "eval").rglob("*"))
    (tmp_path / "broken.yaml").write_text("task: [")
    message = read_error(run, tmp_path, "piqua")
    assert "'piqua' is unknown; close: " in message
    assert "piqa" in message
    assert "cannot be read: broken.yaml: " in message
    assert sorted(pathlib.Path(run, "eval").rglob("*")) == before


def test_invalid_arguments_are_refused_before_anything_runs(trained, data, tmp_path):
    run = trained["modse"]
    before = sorted(pathlib.Path(run, "eval").rglob("*"))
    assert "--tasks is empty" in read_error(run, data)
    assert "is not a directory" in read_error(run, tmp_path / "none", "piqa")
    assert "holds no run" in read_error(tmp_path, data, "piqa")
    assert sorted(pathlib.Path(run, "eval").rglob("*")) == before
    with pytest.raises(UserError, match="has no results of tasks with --limit=7"):
        run_comparison.compare_runs(tuple(trained.values()), 0, (), 7)


def test_invalid_data_is_refused_before_anything_runs(trained, tmp_path):
    run = trained["modse"]
    before = sorted(pathlib.Path(run, "eval").rglob("*"))
    gsm8k = tmp_path / "gsm8k"
    gsm8k.mkdir()
    assert "gsm8k/train.jsonl cannot be read: No such file" in read_error(run, tmp_path, "gsm8k")
    (gsm8k / "train.jsonl").write_text("")
    (gsm8k / "test.jsonl").write_text("")
    assert "has no documents" in read_error(run, tmp_path, "gsm8k")
    (gsm8k / "train.jsonl").write_text("{\n")
    assert "train.jsonl is not jsonl" in read_error(run, tmp_path, "gsm8k")
    one_question = '{"question": "1?", "answer": "#### 1"}\n'  # too few for 8 shots
    (gsm8k / "train.jsonl").write_text(one_question)
    (gsm8k / "test.jsonl").write_text(one_question)
    message = read_error(run, tmp_path, "gsm8k")
    assert "task gsm8k cannot be read: ValueError: Sample larger" in message
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "valid.jsonl").write_text("{}\n")
    (tmp_path / "piqa" / "valid-labels.lst").write_text("")
    message = read_error(run, tmp_path, "piqa")
    assert "valid-labels.lst has 0 lines, valid.jsonl 1" in message
    assert sorted(pathlib.Path(run, "eval").rglob("*")) == before


def test_a_task_that_fails_keeps_the_results_of_those_before_it(trained, data, monkeypatch):
    simple_evaluate = lm_eval.simple_evaluate

    def fail_for_siqa(adapter, tasks, **rest):
        if tasks[0].task_name == "siqa":
            raise ZeroDivisionError("a task's own code")
        return simple_evaluate(adapter, tasks=tasks, **rest)

    monkeypatch.setattr(lm_eval, "simple_evaluate", fail_for_siqa)
    run = trained["equal"]
    with pytest.raises(RunError, match="task siqa failed: ZeroDivisionError: a task's own code"):
        task_runner.run_tasks((run,), 0, ("piqa", "siqa"), str(data), 3, 0)
    assert set(read_results(run, 3)["tasks"]) == {"piqa"}
    message = "has results of piqa at step 2 with --limit=3, not of siqa"
    with pytest.raises(UserError, match=message):
        run_comparison.compare_runs((run, run), 0, ("siqa",), 3)


def test_without_internet_the_error_explains_how_to_use_local_data(trained, harness, tmp_path):
    message = read_error(trained["modse"], tmp_path, "boolq")
    assert message.startswith("task boolq cannot be read: ")
    assert "include: $harness/PATH.yaml" in message


def test_runs_on_other_documents_cannot_be_compared(trained, data):
    workdirs = tuple(trained.values())
    task_runner.run_tasks(workdirs, 0, ("lambada",), str(data), 1, 0)
    path = result_files.samples_path(pathlib.Path(trained["equal"]), 2, 1, "lambada")
    row = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps({**row, "hash": "another"}) + "\n")
    message = "equal was given other documents or shots of lambada"
    with pytest.raises(UserError, match=message):
        run_comparison.compare_runs(workdirs, 0, ("lambada",), 1)
