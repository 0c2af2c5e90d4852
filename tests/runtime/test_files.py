"""Atomic writes, and the hash of the package's source."""

import hashlib
import json
import os

import pytest

from modse_jax.runtime import files, processes
from tests.helpers.runs import ROOT


@pytest.mark.parametrize("content", ["h\u00e9\n", b"\x00\xff"])
def test_atomic_write_replaces_the_file(content, tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    files.write_atomically(path, content)
    expected = content.encode() if isinstance(content, str) else content
    assert path.read_bytes() == expected
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_json_does_not_have_become_null():
    value = {"loss": float("nan"), "bounds": (1.5, -float("inf")), "nested": [{"a": float("inf")}]}
    assert json.loads(files.format_json(value)) == {
        "loss": None,
        "bounds": [1.5, None],
        "nested": [{"a": None}],
    }
    assert "NaN" not in files.format_json(value, indent=1)


def test_failed_atomic_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    path.write_text("old")

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_source_digest_covers_the_whole_package():
    sources = sorted((ROOT / "modse_jax").rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    assert len({path.parent for path in sources}) > 5
    assert processes.source_digest() == digest.hexdigest()
