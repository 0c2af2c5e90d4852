"""Old names of options in config files, flags and saved configs; the format of saved configs."""

import copy
import dataclasses
import json

import pytest
from absl import flags
from ml_collections import config_flags

from modse_jax.config import loading, migration, options
from modse_jax.errors import UserError
from modse_jax.evaluation import model_loading

# Every old name with a value that is not its default, as runs of format 1 saved them.
OLD_VALUES = {
    "moe.gate_term": "learned",
    "moe.block_rows": 512,
    "moe.tail_rows": 32,
    "moe.saved_activations": 2.0,
    "model.unroll": 3,
    "training.seed": 5,
    "training.loss_chunk": 128,
    "training.spike_window": 16,
    "training.max_nonfinite_steps": 4,
    "training.replay_check": 7,
    "training.hang_minutes": 1.5,
}
# Values that were renamed; several of one option are tried in turn.
RENAMED = [
    {"moe.placement": "pairs", "moe.gate": "softmax_top_k_renormalised"},
    {"moe.placement": "columns", "moe.backend": "virtual"},
]


@pytest.fixture(autouse=True)
def nothing_reported(monkeypatch):
    """Lets every test see the lines that a process prints once."""
    monkeypatch.setattr(migration, "_reported", set())


def saved_by_format_1() -> dict:
    """Returns a config.json of format 1 that has every old name: the defaults of then."""
    values = json.loads(json.dumps(dataclasses.asdict(options.Config())))
    for old, new in migration.MIGRATIONS[0].moved_options.items():
        section, _, name = new.rpartition(".")
        old_section, _, old_name = old.rpartition(".")
        values[old_section][old_name] = values[section].pop(name)
    del values["advanced"]
    return values


def set_values(values: dict, flat: dict) -> dict:
    """Sets {"section.option": value} in nested values, and returns them."""
    for path, value in flat.items():
        section, _, name = path.rpartition(".")
        values[section][name] = value
    return values


def expected_config(changes: dict) -> options.Config:
    """Returns the defaults with changed options, which are given under today's names."""
    return loading.from_dict(set_values(dataclasses.asdict(options.Config()), changes))


def new_names(flat: dict) -> dict:
    return {migration.moved_options().get(path, path): value for path, value in flat.items()}


def test_the_tables_name_options_and_values_that_exist():
    today = dict(options.fields())
    moved = migration.moved_options()
    assert set(moved.values()) <= set(today)
    assert not set(moved) & set(today)
    assert set(OLD_VALUES) == set(migration.MIGRATIONS[0].moved_options)
    for step in migration.MIGRATIONS:
        for (path, old), new in step.renamed_values.items():
            choices = today[path].metadata["choices"]
            assert new in choices and old not in choices


def test_a_saved_config_with_every_old_name_is_read(tmp_path, capsys):
    """`read_config` is what evaluation and reports use; resuming uses `from_saved` as well."""
    for renamed in RENAMED:
        values = set_values(saved_by_format_1(), {**OLD_VALUES, **renamed})
        (tmp_path / "config.json").write_text(json.dumps(values))
        config = model_loading.read_config(tmp_path)
        assert config == expected_config({**new_names(OLD_VALUES), **new_values(renamed)})
        assert loading.from_saved(loading.to_saved(config)) == config
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("the saved config is of an older version: ")
        for old, new in migration.moved_options().items():
            assert f"{old} is now called {new}" in lines[0]
        for path, value in new_values(renamed).items():
            assert f"{path}={renamed[path]} is replaced by {path}={value}" in lines[0]
    model_loading.read_config(tmp_path)
    assert capsys.readouterr().err == ""


def new_values(renamed: dict) -> dict:
    table = migration.MIGRATIONS[0].renamed_values
    return {path: table[path, value] for path, value in renamed.items()}


def test_config_files_and_flags_may_use_old_names(tmp_path, capsys):
    """Flags override the file, whichever name either uses. Each old name is reported once."""
    file = tmp_path / "old.py"
    lines = [
        f"    config.{path} = {value!r}\n" for path, value in {**OLD_VALUES, **RENAMED[0]}.items()
    ]
    file.write_text(
        "from modse_jax.config.loading import default_config\n\n"
        "def get_config():\n    config = default_config()\n"
        + "".join(lines)
        + "    config.training.loss_chunk = config.training.loss_chunk * 2\n"
        "    config.advanced.tail_rows = 16\n"
        "    config.moe.update(tail_rows=17)\n"
        "    config.update_from_flattened_dict({'model.unroll': 2})\n"
        "    return config\n"
    )
    arguments = [
        "train.py",
        f"--config={file}",
        "--config.moe.block_rows=256",
        "--config.moe.placement=columns",
        "--config.moe.saved_activations=3",
        "--config.advanced.replay_check=8",
        "--config.training.hang_minutes=2",
        "--config.advanced.hang_minutes=2.5",
    ]
    found = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, lock_config=True, flag_values=found, sys_argv=arguments
    )
    found(arguments)
    config = loading.from_dict(found["config"].value.to_dict())
    changes = {
        **new_names(OLD_VALUES),
        "advanced.loss_chunk": 256,
        "advanced.tail_rows": 17,
        "advanced.unroll": 2,
        "moe.placement": "split",
        "moe.gate": "softmax_top_k_renormalized",
        "advanced.block_rows": 256,
        "advanced.saved_activations": 3.0,
        "advanced.replay_check": 8,
        "advanced.hang_minutes": 2.5,
    }
    assert config == expected_config(changes)
    lines = capsys.readouterr().err.splitlines()
    expected = [f"{old} is now called {new}" for old, new in migration.moved_options().items()]
    expected += [
        "moe.placement=columns is replaced by moe.placement=split",
        "moe.gate=softmax_top_k_renormalised is replaced by moe.gate=softmax_top_k_renormalized",
    ]
    assert sorted(lines) == sorted(expected)


def test_a_copied_config_file_accepts_old_names_as_well():
    base = loading.default_config()
    base.lock()
    copies = (copy.deepcopy(base), base.copy_and_resolve_references())
    for config in copies:
        config.moe.block_rows = 512
        assert config.advanced.block_rows == config.moe.block_rows == 512
    assert base.advanced.block_rows == options.AdvancedConfig.block_rows
    with pytest.raises(AttributeError, match="block_row"):
        base.moe.block_row = 512


def test_an_old_name_wins_over_the_default_of_the_new_one_only():
    values = dataclasses.asdict(options.Config())
    assert loading.from_dict(set_values(values, {"moe.block_rows": 512})) == expected_config(
        {"advanced.block_rows": 512}
    )
    same = set_values(values, {"moe.block_rows": 512, "advanced.block_rows": 512})
    assert loading.from_dict(same).advanced.block_rows == 512
    different = set_values(values, {"advanced.block_rows": 256})
    message = "moe.block_rows=512 and advanced.block_rows=256 set the same option"
    with pytest.raises(UserError, match=message):
        loading.from_dict(different)
    assert different["moe"]["block_rows"] == 512  # the caller's values stay as they are


def test_a_saved_config_carries_its_format_and_a_newer_one_is_refused(tmp_path):
    saved = loading.to_saved(options.Config())
    assert saved["format"] == migration.FORMAT == len(migration.MIGRATIONS) + 1
    (tmp_path / "config.json").write_text(json.dumps({**saved, "format": migration.FORMAT + 1}))
    message = "config.json: the saved config has format=3, and this version reads formats up to 2; "
    with pytest.raises(UserError, match=message):
        model_loading.read_config(tmp_path)
    for bad in (0, "2", True):
        with pytest.raises(UserError, match="must be a positive integer"):
            loading.from_saved({**saved, "format": bad})
    with pytest.raises(
        UserError, match="unknown option moe.gate_term"
    ):  # format 2 has no such name
        loading.from_saved({**saved, "moe": {**saved["moe"], "gate_term": "none"}})
    with pytest.raises(UserError, match="must be a section of options"):
        loading.from_saved({**saved_by_format_1(), "advanced": 8})
