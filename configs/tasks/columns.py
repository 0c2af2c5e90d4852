"""Benchmark files as their publishers have them, in the harness's columns.

Every function makes {split: datasets.Dataset} from the folder `data` (--tasks_dir); the harness also passes what it
knows of a task, of which `config_source`, the path of its YAML file, names the subject.
"""

import csv
import json
import pathlib

import datasets
import pyarrow.ipc

from modse_jax.errors import UserError


def gsm8k(data, **_):
    """gsm8k/{train,test}.jsonl: question, answer."""
    return _splits(train=_jsonl(data, "gsm8k/train.jsonl"), test=_jsonl(data, "gsm8k/test.jsonl"))


def mmlu(data, config_source, **_):
    """mmlu/{dev,test}/SUBJECT_{dev,test}.csv, no header: question, four choices, letter."""
    subject = pathlib.Path(config_source).stem.removeprefix("mmlu_")

    def rows(split):
        with _open(data, f"mmlu/{split}/{subject}_{split}.csv", newline="") as file:
            return [
                {"question": r[0], "choices": r[1:5], "answer": "ABCD".index(r[5])}
                for r in csv.reader(file)
            ]

    return _splits(dev=rows("dev"), test=rows("test"))


def math(data, config_source, **_):
    """math/test.jsonl: problem, level, type, solution; those of one type."""
    name = pathlib.Path(config_source).stem.removeprefix("hendrycks_math_")
    types = {
        "counting_and_prob": "Counting & Probability",
        "num_theory": "Number Theory",
        "precalc": "Precalculus",
    }
    wanted = types.get(name, name.replace("_", " ").title())
    return _splits(test=[row for row in _jsonl(data, "math/test.jsonl") if row["type"] == wanted])


def lambada(data, **_):
    """lambada/lambada_test.jsonl: text, whose last word is asked for."""
    return _splits(test=_jsonl(data, "lambada/lambada_test.jsonl"))


def piqa(data, **_):
    """piqa/valid.jsonl: goal, sol1, sol2; piqa/valid-labels.lst: 0 or 1, line by line."""
    with _open(data, "piqa/valid-labels.lst") as file:
        labels = [int(line) for line in file]
    rows = _jsonl(data, "piqa/valid.jsonl")
    if len(labels) != len(rows):
        raise UserError(
            f"{data}/piqa: valid-labels.lst has {len(labels)} lines, valid.jsonl {len(rows)}"
        )
    return _splits(validation=[{**row, "label": label} for row, label in zip(rows, labels)])


def siqa(data, **_):
    """siqa/validation.arrow, a stream: context, question, answerA, answerB, answerC, label "1" to "3"."""
    with _open(data, "siqa/validation.arrow", mode="rb", encoding=None) as file:
        return _splits(validation=pyarrow.ipc.open_stream(file).read_all().to_pylist())


def triviaqa(data, **_):
    """triviaqa/triviaqa_sm_sub.jsonl: context ("Question: ...?\\nAnswer:"), answer, aliases."""

    def question(row):
        return _unquoted(row["context"].removeprefix("Question: ").removesuffix("\nAnswer:"))

    rows = _jsonl(data, "triviaqa/triviaqa_sm_sub.jsonl")
    return _splits(
        validation=[
            {
                "question": question(row),
                "answer": {"value": row["answer"], "aliases": row["aliases"]},
            }
            for row in rows
        ]
    )


def _unquoted(text):
    """Without the quotes of a CSV field, which some questions of that file have kept."""
    return text[1:-1].replace('""', '"') if len(text) > 1 and text[0] == text[-1] == '"' else text


def agieval(data, config_source, **_):
    """agieval/NAME.jsonl: passage, question, options, label; of cloze questions answer instead of the last two."""
    name = pathlib.Path(config_source).stem
    return _splits(test=[_agieval_row(row) for row in _jsonl(data, f"agieval/{name}.jsonl")])


def _agieval_row(row):
    """AGIEval's own prompts; its only cloze task here is in Chinese."""
    passage = row["passage"] or ""
    if not row["options"]:
        return {
            "query": f"{passage}\u95ee\u9898\uff1a{row['question']}\n\u7b54\u6848\uff1a",
            "answer": row["answer"],
        }
    letters = "ABCDEFG"[: len(row["options"])]
    return {
        "query": f"{passage}Q: {row['question']} Answer Choices: {' '.join(row['options'])}\n"
        f"A: Among A through {letters[-1]}, the answer is",
        "choices": row["options"],
        "gold": [letters.index(row["label"])],
    }


def classification(file, shots="", names="", **_):
    """Any jsonl file of rows with a text and a label. shots: another such file, for the examples before a question.
    names: a text file with a label per line; "": the labels of the files in alphabetical order."""
    splits = {"test": _jsonl("", file)} | ({"train": _jsonl("", shots)} if shots else {})
    if names:
        with _open("", names) as lines:
            known = [line.rstrip("\n") for line in lines]
    else:
        known = sorted({str(row["label"]) for rows in splits.values() for row in rows})
    for row in (row for rows in splits.values() for row in rows):
        if str(row["label"]) not in known:
            raise UserError(f"{names} lacks the label {row['label']!r} of {file}")
    return _splits(
        **{
            split: [
                {"text": row["text"], "labels": known, "gold": known.index(str(row["label"]))}
                for row in rows
            ]
            for split, rows in splits.items()
        }
    )


def _splits(**splits):
    for name, rows in splits.items():
        if not rows:
            raise UserError(f"the split {name} of a task has no documents")
    return {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}


def _jsonl(data, name):
    with _open(data, name) as file:
        try:
            return [json.loads(line) for line in file if line.strip()]
        except ValueError as error:
            raise UserError(f"{pathlib.Path(data) / name} is not jsonl: {error}") from None


def _open(data, name, mode="r", encoding="utf-8", **options):
    path = pathlib.Path(data) / name
    try:
        return open(path, mode, encoding=encoding, **options)
    except OSError as error:
        raise UserError(
            f"task data {path} cannot be read: {error.strerror}; --tasks_dir names the folder that holds "
            f"{name}, and configs/tasks/columns.py says what is in it"
        ) from None
