"""Bad config files end a command with one line."""

import sys

import pytest
from absl import flags

from modse_jax.cli import config_file
from modse_jax.errors import UserError
from tests.helpers.runs import ROOT


def parse(path):
    sys.modules.pop("config_config", None)  # the library loads every file into this module
    return config_file._Parser("config", lock_config=True).parse(str(path))


def test_configs_are_loaded():
    config = parse(ROOT / "configs" / "tiny.py")
    assert config.model.dim == 96 and config.is_locked


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("config.json", '{"format": 2, "seed": 0}', "is a saved config, which no run can start"),
        ("a.py", "x = 1\ndef get_config(: pass\n", "is not Python: .* \\(.*a.py, line 2\\)"),
        ("a.py", "def get_config():\n    return {}\n", "returned dict, not a ConfigDict"),
        ("a.py", "def get_config():\n    pass\n", "returned NoneType, not a ConfigDict"),
        ("a.py", "x = 1\n", "AttributeError: .*get_config"),
        ("a.py", "import no_such_module\n", "ModuleNotFoundError: .* \\(.*a.py, line 1\\)"),
        ("a.py", "def get_config():\n    return 1 / 0\n", "division by zero \\(.*a.py, line 2\\)"),
        ("a.py", "def get_config():\n    return int('x')\n", "invalid literal .* line 2\\)"),
    ],
)
def test_bad_config_files_are_refused_in_one_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        parse(tmp_path / name)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("configs/tiny.py") or name.endswith(".json")


def test_missing_config_file_is_reported_when_it_is_read(tmp_path):
    config = parse(tmp_path / "missing.py")
    with pytest.raises(OSError, match="Failed loading config file"):
        config.to_dict()


def test_flag_has_the_parser(monkeypatch):
    monkeypatch.setattr(config_file, "NAME", "test_config")
    config_file.define_flag("help")
    assert isinstance(flags.FLAGS["test_config"].parser, config_file._Parser)
    delattr(flags.FLAGS, "test_config")
