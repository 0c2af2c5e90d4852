"""Task files, task data and prompts are read as editors of all systems write them."""

import codecs
import json
import types

import pytest

from modse_jax.cli import eval_command
from modse_jax.errors import UserError
from modse_jax.evaluation.benchmarks import published_files, task_files


def test_task_data_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "lambada").mkdir()
    lines = [json.dumps({"text": f"caf\u00e9 {n}"}, ensure_ascii=False) for n in range(3)]
    text = "\r\n".join(lines)
    path = tmp_path / "lambada" / "lambada_test.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + text.encode())
    rows = published_files.lambada(str(tmp_path))["test"]
    assert [row["text"] for row in rows] == ["caf\u00e9 0", "caf\u00e9 1", "caf\u00e9 2"]


def test_task_data_that_is_nested_too_deeply_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(UserError, match="a.jsonl is not jsonl"):
        published_files.classification(str(path))


def test_task_files_are_found_through_links(tmp_path):
    tasks = tmp_path / "tasks"
    elsewhere = tmp_path / "elsewhere"
    for folder in (tasks, elsewhere, tmp_path / "copies"):
        folder.mkdir()
    (elsewhere / "mine.yaml").write_bytes(codecs.BOM_UTF8 + "task: mine\n# caf\u00e9".encode())
    (tasks / "more").symlink_to(elsewhere)
    (tasks / "._mine.yaml").write_bytes(b"\0\1")
    task_files.copy_task_folders(tmp_path / "copies", tmp_path, str(tasks))
    copies = [path.name for path in (tmp_path / "copies" / "theirs").rglob("*.yaml")]
    assert copies == ["mine.yaml"]
    copy = tmp_path / "copies" / "theirs" / "more" / "mine.yaml"
    assert copy.read_bytes() == "task: mine\n# caf\u00e9".encode()


def test_prompt_file_keeps_its_line_ends(tmp_path, monkeypatch):
    path = tmp_path / "prompt.txt"
    path.write_bytes(codecs.BOM_UTF8 + b"one\r\ntwo\n")
    monkeypatch.setattr(eval_command, "FLAGS", types.SimpleNamespace(prompt_file=str(path)))
    assert eval_command._prompts_from_file() == ("one\r\ntwo\n",)
