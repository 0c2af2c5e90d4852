"""The file sweep.json, which says what the workdir of a sweep holds: its arms and its claims.

With it, a report needs no sweep file. Format 1 had only the names of the sweep and of its arms; the
identities of its runs are in results.csv.
"""

import csv
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from modse_jax.config.loading import from_saved
from modse_jax.config.options import Config
from modse_jax.errors import UserError
from modse_jax.runtime import files
from modse_jax.sweeps import results
from modse_jax.sweeps.definition import Sweep
from modse_jax.sweeps.identity import RunIdentity
from modse_jax.sweeps.results import SweepDirectory

FORMAT = 2


class Claims(NamedTuple):
    """The claims of a sweep file about its arms; see the attributes of `definition.Sweep`."""

    fixed: Mapping[str, float] = {}
    fixed_within: Sequence[str] = ()
    compares_shapes: bool = True

    @classmethod
    def of(cls, sweep: Sweep) -> "Claims":
        """Returns the claims of a sweep file."""
        return cls(dict(sweep.fixed), tuple(sweep.fixed_within), sweep.compares_shapes)


class DescribedArm(NamedTuple):
    """An arm of a sweep as its workdir describes it.

    Attributes:
        name: its name.
        id: the identity of its run.
        config: its config; None if the description is of format 1 and the arm has no result.
        code: hash of the source code that the sweep was last started with; "" if not known.
    """

    name: str
    id: str
    config: Config | None
    code: str


class Description(NamedTuple):
    """The contents of sweep.json.

    Attributes:
        sweep: the name of the sweep.
        arms: its arms.
        claims: what the sweep file states; None in format 1.
    """

    sweep: str
    arms: list[DescribedArm]
    claims: Claims | None


def write(
    directory: SweepDirectory, name: str, identities: Mapping[str, RunIdentity], claims: Claims
) -> None:
    """Writes sweep.json.

    Args:
        directory: the workdir.
        name: the name of the sweep.
        identities: the identity of the run of every arm, by name.
        claims: what the sweep file states.
    """
    content = {
        "format": FORMAT,
        "sweep": name,
        "arms": list(identities),
        "claims": claims._asdict(),
        "runs": [{"arm": arm, **identity.to_json()} for arm, identity in identities.items()],
    }
    files.write_atomically(directory.description, files.format_json(content, indent=1) + "\n")


def read_name(directory: SweepDirectory) -> str:
    """Returns the name of the sweep of a workdir that has a sweep.json.

    Raises:
        UserError: the file is damaged, or of a newer format.
    """
    return _read_json(directory)["sweep"]


def read(directory: SweepDirectory) -> Description:
    """Returns the description of a workdir that has a sweep.json.

    Raises:
        UserError: the file is damaged or of a newer format, or a table is that of another sweep.
    """
    content = _read_json(directory)
    name = content["sweep"]
    _check_table(directory, name)
    if content.get("format", 1) == 1:
        return Description(name, _read_arms_of_table(directory, content.get("arms")), None)
    try:
        arms = [
            DescribedArm(run["arm"], run["id"], from_saved(run["config"]), run["code"])
            for run in content["runs"]
        ]
        return Description(name, arms, Claims(**content["claims"]))
    except (KeyError, TypeError) as error:
        raise _damaged(directory, f"{type(error).__name__}: {error}") from None


def _read_json(directory: SweepDirectory) -> dict[str, Any]:
    try:
        content = files.read_json(directory.description)
    except (ValueError, OSError) as error:
        raise _damaged(directory, error) from None
    if not isinstance(content, dict) or not isinstance(content.get("sweep"), str):
        raise _damaged(directory, "it names no sweep")
    found = content.get("format", 1)
    if found not in (1, FORMAT):
        raise UserError(
            f"{directory.description} has format {found}, and this code reads 1 to {FORMAT}; use "
            "newer code"
        )
    return content


def _damaged(directory: SweepDirectory, reason: object) -> UserError:
    return UserError(
        f"{directory.description} is damaged ({reason}); remove it and run `sweep` with its sweep "
        "file again, which writes it anew and repeats no finished run"
    )


def _check_table(directory: SweepDirectory, name: str) -> None:
    """Raises UserError if results.parquet is that of another sweep."""
    path = directory.root / "results.parquet"
    if not path.exists():
        return
    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is damaged ({error}); remove it, and run the sweep again"
        ) from None
    found = metadata.get(b"sweep", b"").decode()
    if found != name:
        raise UserError(
            f"{path} is the table of the sweep {found!r}, and {directory.description.name} "
            f"describes {name!r}; remove the file that does not belong here"
        )


def _read_arms_of_table(directory: SweepDirectory, names: Any) -> list[DescribedArm]:
    """Returns the arms of a description of format 1, whose ids are in results.csv."""
    path = directory.root / "results.csv"
    if not path.exists():
        raise UserError(
            f"{path} is missing, and {directory.description} of an older version has no ids of "
            "runs; run the sweep again, which repeats no finished run"
        )
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if [row.get("arm") for row in rows] != names or any("id" not in row for row in rows):
        raise UserError(
            f"{path} has other arms than {directory.description}, so it may be the table of "
            "another sweep; run the sweep again, which writes it anew"
        )
    arms = []
    for row in rows:
        result = results.read_result(directory, row["id"])
        config = None if result is None else results.read_config(result)
        code = "" if result is None else result["code"]
        arms.append(DescribedArm(row["arm"], row["id"], config, code))
    return arms
