"""Any text can be printed on any console."""

import io
import pathlib
import sys

import pytest

from modse_jax.errors import UserError
from modse_jax.runtime import console_encoding, files, processes


def test_unprintable_characters_are_escaped(monkeypatch):
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii", newline="\n"))
    console_encoding.escape_unprintable()
    print("caf\u00e9 \udce9", flush=True)
    assert output.getvalue() == b"caf\\xe9 \\udce9\n"


def test_replaced_streams_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    console_encoding.escape_unprintable()


def test_directories_to_write_to_must_have_a_name_that_is_text():
    files.check_is_text(pathlib.Path("l\u00e4uft"), "--out")
    with pytest.raises(UserError, match="--out=.* cannot be read as text .* PYTHONUTF8=1"):
        files.check_is_text(pathlib.Path("l\udcc3\udca4uft"), "--out")


def test_paths_that_are_not_utf_8_are_sent_as_their_bytes():
    assert processes._encode("l\udcc3\udca4uft") == "l\u00e4uft".encode()
