"""Describes which code runs: the commit of the repository, or the version of the package."""

import functools
import importlib.metadata
import pathlib
import subprocess

PACKAGE = pathlib.Path(__file__).parents[1]


def git_output(*arguments: str) -> str:
    """Returns the output of a git command on this code, or "" without git or a repository."""
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, cwd=PACKAGE
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


@functools.cache
def describe_revision() -> str:
    """Returns the commit, with "+changes" if the package has others, or the package's version."""
    commit = git_output("rev-parse", "--short=12", "HEAD")
    if commit:
        return commit + ("+changes" if git_output("status", "--porcelain", "--", ".") else "")
    try:
        return importlib.metadata.version("modse-jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
