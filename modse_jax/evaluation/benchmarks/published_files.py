"""Reads benchmark data in the files that its publishers distribute.

Each public function is the `custom_dataset` of a task file in configs/tasks: lm-evaluation-harness
calls it to load the data of the task. It reads files below the folder `data` (--tasks_dir), and
returns {split: dataset} with the columns that the harness's task expects. The harness passes
further keyword arguments. Of these only `config_source` is used: the path of the task's YAML file,
whose name contains the subject.
"""

import csv
import json
import pathlib
from typing import IO, Any

import datasets
import pyarrow.ipc

from modse_jax.errors import UserError

Splits = dict[str, datasets.Dataset]


def gsm8k(data: str, **_: Any) -> Splits:
    """Reads GSM8K from gsm8k/{train,test}.jsonl, which have the fields question and answer."""
    return _make_splits(
        train=_read_jsonl(data, "gsm8k/train.jsonl"),
        test=_read_jsonl(data, "gsm8k/test.jsonl"),
    )


def mmlu(data: str, config_source: str, **_: Any) -> Splits:
    """Reads one subject of MMLU from mmlu/{dev,test}/SUBJECT_{dev,test}.csv.

    The files have no header. Their columns are the question, four choices and the right letter.
    """
    subject = pathlib.Path(config_source).stem.removeprefix("mmlu_")
    return _make_splits(
        dev=_read_mmlu(data, subject, "dev"), test=_read_mmlu(data, subject, "test")
    )


def _read_mmlu(data: str, subject: str, split: str) -> list[dict]:
    with _open(data, f"mmlu/{split}/{subject}_{split}.csv", newline="") as file:
        return [
            {"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])}
            for row in csv.reader(file)
        ]


def math(data: str, config_source: str, **_: Any) -> Splits:
    """Reads the problems of one type of MATH from math/test.jsonl.

    Its fields are problem, level, type and solution.
    """
    name = pathlib.Path(config_source).stem.removeprefix("hendrycks_math_")
    irregular_names = {
        "counting_and_prob": "Counting & Probability",
        "num_theory": "Number Theory",
        "precalc": "Precalculus",
    }
    wanted = irregular_names.get(name, name.replace("_", " ").title())
    rows = _read_jsonl(data, "math/test.jsonl")
    return _make_splits(test=[row for row in rows if row["type"] == wanted])


def lambada(data: str, **_: Any) -> Splits:
    """Reads LAMBADA from lambada/lambada_test.jsonl.

    Its only field is text, whose last word is to be predicted.
    """
    return _make_splits(test=_read_jsonl(data, "lambada/lambada_test.jsonl"))


def piqa(data: str, **_: Any) -> Splits:
    """Reads PIQA from piqa/valid.jsonl and piqa/valid-labels.lst.

    The first has the fields goal, sol1 and sol2, the second 0 or 1 per line, the right solution.
    """
    with _open(data, "piqa/valid-labels.lst") as file:
        labels = [int(line) for line in file]
    rows = _read_jsonl(data, "piqa/valid.jsonl")
    if len(labels) != len(rows):
        raise UserError(
            f"{data}/piqa: valid-labels.lst has {len(labels)} lines, valid.jsonl {len(rows)}"
        )
    return _make_splits(validation=[{**row, "label": label} for row, label in zip(rows, labels)])


def siqa(data: str, **_: Any) -> Splits:
    """Reads Social IQa from siqa/validation.arrow, an Arrow stream.

    Its columns are context, question, answerA, answerB, answerC and label ("1" to "3").
    """
    with _open(data, "siqa/validation.arrow", mode="rb", encoding=None) as file:
        table = pyarrow.ipc.open_stream(file).read_all()
    return _make_splits(validation=table.to_pylist())


def triviaqa(data: str, **_: Any) -> Splits:
    """Reads TriviaQA from triviaqa/triviaqa_sm_sub.jsonl.

    Its fields are context, answer and aliases. The context is a complete prompt,
    "Question: ...?\\nAnswer:". Only its question is used.
    """
    rows = []
    for row in _read_jsonl(data, "triviaqa/triviaqa_sm_sub.jsonl"):
        question = row["context"].removeprefix("Question: ").removesuffix("\nAnswer:")
        answer = {"value": row["answer"], "aliases": row["aliases"]}
        rows.append({"question": _remove_csv_quotes(question), "answer": answer})
    return _make_splits(validation=rows)


def _remove_csv_quotes(text: str) -> str:
    """Removes the quotes of a CSV field, which some questions of the TriviaQA file still have."""
    is_quoted = len(text) > 1 and text[0] == text[-1] == '"'
    return text[1:-1].replace('""', '"') if is_quoted else text


def agieval(data: str, config_source: str, **_: Any) -> Splits:
    """Reads one task of AGIEval from agieval/NAME.jsonl.

    Its fields are passage, question, options and label. Cloze questions have an answer instead of
    options and a label.
    """
    name = pathlib.Path(config_source).stem
    rows = _read_jsonl(data, f"agieval/{name}.jsonl")
    return _make_splits(test=[_agieval_row(row) for row in rows])


def _agieval_row(row: dict) -> dict:
    """Returns the document for a row of AGIEval: its own prompt, with choices and right answer."""
    passage = row["passage"] or ""
    if not row["options"]:
        # The only cloze task (no choices to choose an answer from) is in Chinese, so the prompt is:
        # the characters mean "Question: ...\nAnswer:".
        prompt = f"{passage}\u95ee\u9898\uff1a{row['question']}\n\u7b54\u6848\uff1a"
        return {"query": prompt, "answer": row["answer"]}
    letters = "ABCDEFG"[: len(row["options"])]
    prompt = (
        f"{passage}Q: {row['question']} Answer Choices: {' '.join(row['options'])}\n"
        f"A: Among A through {letters[-1]}, the answer is"
    )
    return {"query": prompt, "choices": row["options"], "gold": [letters.index(row["label"])]}


def classification(file: str, shots: str = "", names: str = "", **_: Any) -> Splits:
    """Reads any JSON Lines file whose rows have a text and a label.

    Args:
        file: The file with the questions.
        shots: Another such file, from which the few-shot examples are drawn; "" for none.
        names: A text file with one label per line, in the order of the choices; "" for the labels
            of the two files in alphabetical order.

    Raises:
        UserError: A file cannot be read, or a label is not among `names`.
    """
    splits = {"test": _read_jsonl("", file)}
    if shots:
        splits["train"] = _read_jsonl("", shots)
    all_rows = [row for rows in splits.values() for row in rows]
    if names:
        with _open("", names) as lines:
            labels = [line.rstrip("\n") for line in lines]
    else:
        labels = sorted({str(row["label"]) for row in all_rows})
    for row in all_rows:
        if str(row["label"]) not in labels:
            raise UserError(f"{names} lacks the label {row['label']!r} of {file}")
    prepared = {}
    for split, rows in splits.items():
        prepared[split] = [
            {"text": row["text"], "labels": labels, "gold": labels.index(str(row["label"]))}
            for row in rows
        ]
    return _make_splits(**prepared)


def _make_splits(**splits: list[dict]) -> Splits:
    for name, rows in splits.items():
        if not rows:
            raise UserError(f"the split {name} of a task has no documents")
    return {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}


def _read_jsonl(data: str, name: str) -> list[dict]:
    with _open(data, name) as file:
        try:
            return [json.loads(line) for line in file if line.strip()]
        except (ValueError, RecursionError) as error:
            raise UserError(f"{pathlib.Path(data) / name} is not jsonl: {error}") from None


def _open(
    data: str, name: str, mode: str = "r", encoding: str | None = "utf-8-sig", **options: Any
) -> IO:
    path = pathlib.Path(data) / name
    try:
        return open(path, mode, encoding=encoding, **options)
    except OSError as error:
        raise UserError(
            f"task data {path} cannot be read: {error.strerror}; --tasks_dir must be the folder "
            f"that contains {name}; modse_jax/evaluation/benchmarks/published_files.py describes "
            "its content"
        ) from None
