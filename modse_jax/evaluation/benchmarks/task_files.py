"""Finds and reads benchmark tasks, which are YAML files of lm-evaluation-harness.

In addition to the harness's own format, our task files and those in --tasks_dir may contain:

* `$harness` for the harness's folder of tasks, `$tasks` for this project's folder (configs/tasks),
  and `$data` for --tasks_dir.
* Lines that end with `# local`. They apply only if --tasks_dir is given; without it the data is
  downloaded from the Hugging Face hub.
"""

import difflib
import pathlib
import re
import tempfile
from collections.abc import Iterable
from typing import Any, NamedTuple

from modse_jax.data.sources import folder_files
from modse_jax.errors import UserError, describe_exception

TASKS_FOLDER = pathlib.Path(__file__).parents[3] / "configs" / "tasks"

# The folders of the harness that our own groups of tasks include. Reading only these takes seconds;
# reading all tasks of the harness takes much longer.
STOCK_FOLDERS = ("mmlu/default", "agieval", "hendrycks_math")

MAX_FILE_BYTES = 2**20  # larger files of a task folder are data, and are not copied
MAX_ERROR_CHARACTERS = 300

OFFLINE_ADVICE = (
    "where there is no internet, --tasks_dir=DIR takes a file DIR/NAME.yaml with "
    "`include: $harness/PATH.yaml` of the stock task, `task: NAME`, `dataset_path: json`, "
    "`dataset_name: null` and `dataset_kwargs: {data_files: {test: $data/FILE.jsonl}}`"
)


class Task(NamedTuple):
    """A requested benchmark.

    A name may stand for one task of the harness, for a group of tasks such as MMLU with its
    subjects, or for all tasks with a tag.

    Attributes:
        name: The name on the command line.
        built: The harness's objects for it: one group, one task, or the tasks with the tag.
        parts: The names of its tasks, for example the subjects of MMLU.
    """

    name: str
    built: list
    parts: tuple[str, ...]


class LoadedTasks(NamedTuple):
    """The requested benchmarks, whose data has been read, and the harness's object that read them.

    Attributes:
        manager: The harness's TaskManager.
        tasks: The benchmarks.
    """

    manager: Any
    tasks: list[Task]


class TaskFolders(NamedTuple):
    """Copies of the task folders.

    Attributes:
        folders: The copies: of this project's folder, and of --tasks_dir if it is given.
        unreadable: A message for each task file that is invalid YAML.
    """

    folders: list[pathlib.Path]
    unreadable: list[str]


def load(names: tuple[str, ...], tasks_dir: str) -> LoadedTasks:
    """Reads benchmarks and their data.

    Args:
        names: Names of tasks, groups or tags.
        tasks_dir: A folder with task files and data; "" for none.

    Raises:
        UserError: A task is unknown, or its file or its data cannot be read.
    """
    from lm_eval import tasks as harness

    if not names:
        raise UserError("--tasks is empty; give for example --tasks=piqa,mmlu")
    harness_folder = pathlib.Path(harness.__file__).parent
    own_names = sorted(path.stem for path in TASKS_FOLDER.glob("*.yaml"))
    only_own = set(names) <= set(own_names)
    with tempfile.TemporaryDirectory() as temporary:
        copies = copy_task_folders(pathlib.Path(temporary), harness_folder, tasks_dir)
        include = copies.folders
        if only_own:
            include = [*(harness_folder / name for name in STOCK_FOLDERS), *include]
        manager = harness.TaskManager(include_path=include, include_defaults=not only_own)
        for name in names:
            if name not in manager.all_tasks:
                _raise_unknown(name, manager.all_tasks, own_names, copies.unreadable)
        # dict.fromkeys removes repeated names and keeps the order.
        return LoadedTasks(manager, [_load_task(manager, name) for name in dict.fromkeys(names)])


def _raise_unknown(
    name: str, known: Iterable[str], own_names: list[str], unreadable: list[str]
) -> None:
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    raise UserError(
        f"--tasks: {name!r} is unknown; close: {', '.join(close) or 'none'}; this project's "
        f"own are {', '.join(own_names)}"
        + "".join(f"; cannot be read: {message}" for message in unreadable)
    )


def _load_task(manager: Any, name: str) -> Task:
    """Loads a benchmark and builds its first prompt.

    Problems with its files or data are thus found before the first benchmark is run.
    """
    try:
        loaded = manager.load([name])
    except UserError:
        raise
    except Exception as error:  # the harness, the code of a task and the hub raise anything
        raise UserError(_describe_error(name, error)) from None
    for part, task in loaded["tasks"].items():
        if not len(task.eval_docs):
            raise UserError(f"task {part} has no documents")
        try:
            task.build_all_requests(limit=1, rank=0, world_size=1)
        except Exception as error:  # for example too few documents for its shots
            raise UserError(_describe_error(part, error)) from None
    group = loaded.get("groups", {}).get(name)
    built = [group] if group else list(loaded["tasks"].values())
    return Task(name, built, tuple(loaded["tasks"]))


def _describe_error(name: str, error: Exception) -> str:
    """Returns the first line of an error, with advice if the data could not be downloaded."""
    first_line = describe_exception(error).splitlines()[0]
    package = type(error).__module__.partition(".")[0]
    is_download = isinstance(error, OSError) or package in ("datasets", "huggingface_hub")
    advice = f"; {OFFLINE_ADVICE}" if is_download else ""
    return f"task {name} cannot be read: {type(error).__name__}: {first_line}{advice}"


def copy_task_folders(
    target: pathlib.Path, harness_folder: pathlib.Path, tasks_dir: str
) -> TaskFolders:
    """Copies the task files of this project and of `tasks_dir`, in the harness's own format.

    `$` names and `# local` lines are resolved; see the description of this module.

    Args:
        target: The folder that receives the copies.
        harness_folder: The harness's own folder of tasks.
        tasks_dir: A folder with task files and data; "" for none.
    """
    values = {"harness": str(harness_folder), "tasks": str(target / "ours"), "data": tasks_dir}
    copies = {TASKS_FOLDER: target / "ours"}
    if tasks_dir:
        copies[pathlib.Path(tasks_dir)] = target / "theirs"
    for source, copy in copies.items():
        copy.mkdir()
        _copy_task_folder(source, copy, values)
    return TaskFolders(list(copies.values()), _find_unreadable(target))


def _copy_task_folder(source: pathlib.Path, target: pathlib.Path, values: dict[str, str]) -> None:
    for name, path in folder_files.find_in_folder("text", source, ()).files:
        is_task_code = path.suffix in ("", ".yaml", ".py")
        if not is_task_code or path.stat().st_size >= MAX_FILE_BYTES:
            continue
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        if path.suffix == ".yaml":
            text = _resolve_task_file(text, values)
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text, encoding="utf-8")


def _resolve_task_file(text: str, values: dict[str, str]) -> str:
    """Returns the text of a task file with `$` names and `# local` lines resolved.

    Args:
        text: The text of the file.
        values: {name without "$": text}; "data" is "" if there is no --tasks_dir.
    """
    has_local_data = bool(values["data"])
    lines = [line for line in text.splitlines() if has_local_data or not line.endswith("# local")]
    text = re.sub(r"\$(harness|tasks|data)\b", lambda match: values[match[1]], "\n".join(lines))
    # A task inherits the tags of the task that it includes. With an inherited tag, the tag would
    # stand for the derived task only and hide the harness's tasks with that tag.
    if re.search("^include:", text, re.M) and not re.search("^tag:", text, re.M):
        text += "\ntag: []"
    return text


def _find_unreadable(folder: pathlib.Path) -> list[str]:
    """Returns a message for every invalid YAML file in a folder.

    The harness silently ignores such files, and would only report that a task is unknown.
    """
    # The harness has no public function to read a task file.
    from lm_eval.tasks._yaml_loader import load_yaml

    unreadable = []
    for path in folder.rglob("*.yaml"):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:
            message = " ".join(describe_exception(error).split())[:MAX_ERROR_CHARACTERS]
            unreadable.append(f"{path.name}: {message}")
    return unreadable
