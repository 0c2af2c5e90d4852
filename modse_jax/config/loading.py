"""Builds configs from plain values: config files, command-line flags and saved runs."""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from modse_jax.config.migration import FORMAT, migrate, moved_options, report_once
from modse_jax.config.option_dict import OptionDict, build_option_dict
from modse_jax.config.option_fields import get_option
from modse_jax.config.options import Config, fields
from modse_jax.errors import UserError

# Options that a resumed run may change. Only training.steps affects the training itself: it sets
# the length of the cosine schedule.
RESUMABLE = (
    "training.steps",
    "training.log_every",
    "training.eval_every",
    "training.checkpoint_every",
    "advanced.max_nonfinite_steps",
    "training.rewind",
    "advanced.replay_check",
    "advanced.hang_minutes",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "evaluation.batch_size",
    "evaluation.capacity_factor",
    "evaluation.sample_tokens",
    "evaluation.prompts",
    "evaluation.temperature",
    "evaluation.top_k",
    "evaluation.top_p",
)

# Options that a resumed run may change as well, unless the capacity or the load-balancing loss is
# computed per group of devices. They change the order of floating-point sums.
RESUMABLE_ANY_MESH = ("mesh.data", "mesh.fsdp", "mesh.expert", "moe.placement", "moe.exchange")


def default_config() -> OptionDict:
    """Returns the defaults as a ConfigDict, from which every file in configs/ starts."""
    return build_option_dict(dataclasses.asdict(Config()))


def from_dict(values: Mapping[str, Any]) -> Config:
    """Builds a checked config from nested plain values, such as a ConfigDict's `to_dict()`.

    Names and values of older versions are replaced as in `migration.MIGRATIONS`, each with one line
    on stderr per process.

    Raises:
        UserError: an option is unknown, missing, of the wrong type or out of range.
    """
    migrated, changes = migrate(values)
    for line in changes:
        report_once(line)
    return _build(Config, migrated, "")


def to_saved(config: Config) -> dict[str, Any]:
    """Returns a config as nested plain values with its format number, as config.json holds it."""
    return {"format": FORMAT, **dataclasses.asdict(config)}


def from_saved(values: Mapping[str, Any]) -> Config:
    """Builds a config from the saved values of a run: config.json, or the meta of a checkpoint.

    A run of an older version has old names, and lacks the options that were added later. The names
    are replaced as in `migration.MIGRATIONS`, and missing options take their defaults. One line on
    stderr per process lists the names, and one the missing options.

    Raises:
        UserError: as `from_dict`, but not for missing options; or the format is a newer one.
    """
    complete, changes = migrate(values)
    if changes:
        report_once(f"the saved config is of an older version: {'; '.join(changes)}")
    added = []
    for path, field in fields():
        *sections, name = path.split(".")
        target = complete
        for section in sections:
            saved_section = target.get(section, {})
            if not isinstance(saved_section, Mapping):
                raise UserError(f"{section}={saved_section!r} must be a section of options")
            target = target.setdefault(section, {})
        if name not in target:
            target[name] = field.default
            added.append(f"{path}={field.default!r}")
    config = _build(Config, complete, "")
    if added:
        report_once(
            f"the saved config is of an older version; defaults are used for {', '.join(added)}"
        )
    return config


def override_options(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns a checked copy of a config with other values of some options.

    Args:
        config: the config, which stays as it is.
        values: {"section.option": value}.

    Raises:
        UserError: as `from_dict`.
    """
    nested = dataclasses.asdict(config)
    for path, value in values.items():
        *sections, name = path.split(".")
        section = nested
        for section_name in sections:
            section = section.setdefault(section_name, {})
        section[name] = value
    return from_dict(nested)


def to_option_dict(config: Config) -> OptionDict:
    """Returns a config as the ConfigDict that a file in configs/ returns."""
    return build_option_dict(dataclasses.asdict(config))


def to_flat_dict(config: Config) -> dict[str, Any]:
    """Returns {"section.option": value} of every option."""
    return {path: get_option(config, path) for path, _ in fields()}


def differences(old: Config, new: Config) -> list[str]:
    """Returns a line `name: old -> new` for every option whose value differs."""
    new_values = to_flat_dict(new)
    return [
        f"{path}: {value!r} -> {new_values[path]!r}"
        for path, value in to_flat_dict(old).items()
        if value != new_values[path]
    ]


def explain_unknown(path: str) -> str:
    """Returns why "section.option" is not the name of an option; "" if it is one, or an old one."""
    by_section: dict[str, list[str]] = {}
    for known, _ in fields():
        section, _, name = known.rpartition(".")
        by_section.setdefault(section, []).append(name)
    whole = by_section.pop("")  # options without a section
    section, _, name = path.partition(".")
    if path in moved_options() or path in whole or name in by_section.get(section, []):
        return ""
    if section not in by_section:
        return _describe_unknown(section, [*whole, *by_section], "")
    if not name:
        example = f"{section}.{by_section[section][0]}"
        return f"{section} is a section of options; set one of them, such as {example}"
    return _describe_unknown(name, by_section[section], f"{section}.")


def _describe_unknown(name: str, known: Iterable[str], prefix: str) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(known)}"
    return f"unknown option {prefix}{name}; {hint}"


def _build(config_class: type, values: Any, prefix: str) -> Any:
    """Builds a config class from a mapping that holds exactly its fields."""
    if not isinstance(values, Mapping):
        raise UserError(f"{prefix.rstrip('.') or 'config'}={values!r} must be a section of options")
    known = {field.name: field for field in dataclasses.fields(config_class)}
    for name in values:
        if name not in known:
            raise UserError(_describe_unknown(name, known, prefix))
    missing = [prefix + name for name in known if name not in values]
    if missing:
        raise UserError(f"config lacks {', '.join(missing)}")
    built = {name: _cast(known[name], value, prefix + name) for name, value in values.items()}
    return config_class(**built)


def _cast(field: dataclasses.Field, value: Any, path: str) -> Any:
    """Returns a value as the type of its field, or raises UserError that names the option."""
    kind: Any = field.type
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, path + ".")
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if typing.get_origin(item) is tuple:
            return _cast_tuples(value, typing.get_args(item), path)
        return _cast_tuple(value, item, path)
    if kind is float and _is(value, int):
        return float(value)
    if not _is(value, kind):
        raise UserError(f"{path}={value!r} must be of type {kind.__name__}")
    return value


def _cast_tuple(value: Any, item: type, path: str) -> tuple:
    """Returns a list or tuple of one type as a tuple."""
    if not isinstance(value, (tuple, list)) or not all(_is(v, item) for v in value):
        raise UserError(f"{path}={value!r} must be a tuple of {item.__name__}")
    return tuple(value)


def _cast_tuples(value: Any, kinds: tuple[type, ...], path: str) -> tuple[tuple, ...]:
    """Returns a list or tuple of tuples, such as `data.mixture`, with items of the given types."""
    if not isinstance(value, (tuple, list)) or not all(_has_types(v, kinds) for v in value):
        form = ", ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{path}={value!r} must be a tuple of tuples: (({form}), ...)")
    return tuple(tuple(kind(v) for kind, v in zip(kinds, item)) for item in value)


def _has_types(values: Any, kinds: tuple[type, ...]) -> bool:
    """Tests whether a list or tuple has one item of each type; an int may be given as a float."""
    if not isinstance(values, (tuple, list)) or len(values) != len(kinds):
        return False
    return all(_is(v, kind) or (kind is float and _is(v, int)) for v, kind in zip(values, kinds))


def _is(value: Any, kind: type) -> bool:
    """Tests whether a value has a type; a bool is no int."""
    return isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
