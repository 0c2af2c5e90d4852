"""Small files of every benchmark, in the formats of their publishers."""

import csv
import json
import pathlib

import lm_eval
import pyarrow

MATH_TYPES = (
    "Algebra",
    "Counting & Probability",
    "Geometry",
    "Intermediate Algebra",
    "Number Theory",
    "Prealgebra",
    "Precalculus",
)
AGIEVAL_CHOICE_TASKS = ("aqua-rat", "gaokao-english", "lsat-ar", "sat-en", "sat-math")


def write_all(root: pathlib.Path) -> None:
    """Writes files of all benchmarks below a folder."""
    write_gsm8k(root)
    write_mmlu(root)
    write_math(root)
    write_lambada(root)
    write_piqa(root)
    write_siqa(root)
    write_triviaqa(root)
    write_agieval(root)
    write_intent(root)


def write_jsonl(path: pathlib.Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_gsm8k(root: pathlib.Path) -> None:
    for number, split in enumerate(("train", "test")):
        rows = [
            {"question": f"{n} and {number}?", "answer": f"sum\n#### {n + number}"}
            for n in range(12)
        ]
        write_jsonl(root / "gsm8k" / f"{split}.jsonl", rows)


def write_mmlu(root: pathlib.Path) -> None:
    stock_tasks = pathlib.Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    subjects = [path.stem.removeprefix("mmlu_") for path in stock_tasks.glob("mmlu_*.yaml")]
    for split, count in (("dev", 5), ("test", 3)):
        folder = root / "mmlu" / split
        folder.mkdir(parents=True, exist_ok=True)
        for subject in subjects:
            with open(folder / f"{subject}_{split}.csv", "w", newline="") as file:
                writer = csv.writer(file)
                for n in range(count):
                    choices = ["one", 'tw"o', "three, four", "five"]
                    writer.writerow([f"{subject} {n}?", *choices, "ABCD"[n % 4]])


def write_math(root: pathlib.Path) -> None:
    rows = []
    for type_name in MATH_TYPES:
        for n in range(7):
            solution = f"It is $\\boxed{{[{n}, {n + 1}]}}$."
            row = {"problem": f"{n}+1", "solution": solution, "level": "Level 1"}
            rows.append({**row, "type": type_name})
    write_jsonl(root / "math" / "test.jsonl", rows)


def write_lambada(root: pathlib.Path) -> None:
    rows = [{"text": f"number {n} is the last word{n}"} for n in range(7)]
    write_jsonl(root / "lambada" / "lambada_test.jsonl", rows)


def write_piqa(root: pathlib.Path) -> None:
    rows = [{"goal": f"open {n}", "sol1": "pull", "sol2": "push"} for n in range(7)]
    write_jsonl(root / "piqa" / "valid.jsonl", rows)
    (root / "piqa" / "valid-labels.lst").write_text("0\n1\n" * 3 + "0\n")


def write_siqa(root: pathlib.Path) -> None:
    table = pyarrow.table(
        {
            "context": [f"{n} met" for n in range(7)],
            "question": ["Why?"] * 7,
            "answerA": ["a"] * 7,
            "answerB": ["b"] * 7,
            "answerC": ["c"] * 7,
            "label": ["1", "2", "3", "1", "2", "3", "1"],
        }
    )
    (root / "siqa").mkdir()
    path = str(root / "siqa" / "validation.arrow")
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def write_triviaqa(root: pathlib.Path) -> None:
    rows = []
    for n in range(7):
        context = f'Question: "Which ""{n}""?"\nAnswer:'
        rows.append({"context": context, "answer": str(n), "aliases": [f"no. {n}", str(n)]})
    write_jsonl(root / "triviaqa" / "triviaqa_sm_sub.jsonl", rows)


def write_agieval(root: pathlib.Path) -> None:
    choices = [
        {
            "passage": "A passage." if n % 2 else None,
            "question": f"{n}?",
            "label": "B",
            "options": ["(A)x", "(B)y", "(C)z"],
        }
        for n in range(7)
    ]
    for name in AGIEVAL_CHOICE_TASKS:
        write_jsonl(root / "agieval" / f"{name}.jsonl", choices)
    cloze = [
        {
            "passage": None,
            "question": f"{n}+2=",
            "options": None,
            "label": None,
            "answer": str(n + 2),
        }
        for n in range(7)
    ]
    write_jsonl(root / "agieval" / "gaokao-mathcloze.jsonl", cloze)


def write_intent(root: pathlib.Path) -> None:
    rows = [{"text": f"turn {n}", "label": ("on", "off", "dim")[n % 3]} for n in range(8)]
    for split in ("train", "test"):
        write_jsonl(root / "intent" / f"{split}.jsonl", rows)
