"""The folder of compiled programs: where it is, how large, and that the next process uses it."""

import os
import pathlib
import subprocess
import sys

import pytest

from modse_jax.runtime import compilation_cache

ROOT = pathlib.Path(__file__).parents[2]

COUNT_HITS = """
import jax
from modse_jax.runtime import compilation_cache
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
folder = compilation_cache.enable()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones((3, 3)))
print(folder)
print(sum("cache_hits" in name for name in hits))
"""


def count_hits(**variables: str) -> list[str]:
    """Returns the folder that a new process chooses, and the number of programs that it finds."""
    kept = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    environment = {**kept, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **variables}
    done = subprocess.run(
        [sys.executable, "-c", COUNT_HITS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_second_process_loads_what_the_first_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, hits = count_hits(XDG_CACHE_HOME=str(tmp_path))
    assert pathlib.Path(folder) == compilation_cache.default_folder()
    assert hits == "0" and any(pathlib.Path(folder).iterdir())
    _, hits = count_hits(XDG_CACHE_HOME=str(tmp_path))
    assert int(hits) > 0


@pytest.mark.parametrize(
    "variables",
    [
        {"JAX_COMPILATION_CACHE_DIR": "{root}/chosen"},
        {"JAX_ENABLE_COMPILATION_CACHE": "0"},
        {"XDG_CACHE_HOME": "{root}/file"},
    ],
    ids=["another folder", "off", "a folder that cannot be made"],
)
def test_the_users_choice_is_kept(variables, tmp_path):
    (tmp_path / "file").write_text("")
    chosen = {name: value.format(root=tmp_path) for name, value in variables.items()}
    folder, _ = count_hits(**{"XDG_CACHE_HOME": str(tmp_path / "default"), **chosen})
    assert folder == chosen.get("JAX_COMPILATION_CACHE_DIR", "None")
    assert not (tmp_path / "default").exists()


def test_processors_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = compilation_cache.default_folder()
    monkeypatch.setattr(compilation_cache, "describe_processor", lambda: "another one")
    assert compilation_cache.default_folder() != here
    assert compilation_cache.default_folder().parent == here.parent


def test_a_user_without_a_home_has_no_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(pathlib.Path, "home", lambda: pathlib.Path("~no-such-user").expanduser())
    assert compilation_cache.default_folder() is None


def test_the_oldest_files_are_deleted_first_and_empty_ones_always(tmp_path):
    for age, (name, size) in enumerate([("new", 40), ("empty", 0), ("old", 40), ("oldest", 40)]):
        path = tmp_path / "kind" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * size)
        os.utime(path, (1000 - age, 1000 - age))
    compilation_cache.delete_oldest(tmp_path, 90)
    assert {path.name for path in (tmp_path / "kind").iterdir()} == {"new", "old"}
    compilation_cache.delete_oldest(tmp_path, 0)
    assert not list((tmp_path / "kind").iterdir())
