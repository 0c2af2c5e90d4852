"""The inspect command shows the card, a decoded record, and a picture."""

import pytest

from modse_jax.data import inspect
from tests.helpers.datasets import prepare_source


def test_inspect_shows_card_record_and_picture(tmp_path, corpus, capsys):
    card = prepare_source(f"text:{corpus}", "bytes", tmp_path / "data")
    inspect.main([f"--data={tmp_path / 'data'}", "--record=1", f"--out={tmp_path}"])
    output = capsys.readouterr().out
    assert '"tokenizer": "bytes:' in output
    num_documents = card["splits"]["train"]["documents"]
    assert f"train: {num_documents} documents" in output
    assert "---- record 1 of train: 33 tokens" in output
    assert "==== segment 1" in output
    assert "def f" in output
    assert (tmp_path / "lengths.png").stat().st_size > 5000


def test_inspect_refuses_a_record_that_does_not_exist(tmp_path, corpus, capsys):
    prepare_source(f"text:{corpus}", "bytes", tmp_path / "data")
    with pytest.raises(SystemExit) as stop:
        inspect.main([f"--data={tmp_path / 'data'}", "--record=100000"])
    assert stop.value.code == 2
    assert "records 0 to" in capsys.readouterr().err
