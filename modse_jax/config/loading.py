"""TODO"""

import dataclasses
import difflib
import typing

import ml_collections

from modse_jax.config.option_fields import get_option
from modse_jax.config.options import Config, fields, renamed
from modse_jax.errors import UserError

# What a resumed run may change. Of these only training.steps touches training, by the length of the cosine.
RESUMABLE = (
    "training.steps",
    "training.log_every",
    "training.eval_every",
    "training.checkpoint_every",
    "training.max_nonfinite_steps",
    "training.rewind",
    "training.replay_check",
    "training.hang_minutes",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "evaluation.batch_size",
    "evaluation.sample_tokens",
    "evaluation.prompts",
    "evaluation.temperature",
    "evaluation.top_k",
    "evaluation.top_p",
)


# And this, which changes the order of sums, unless a capacity or a balance loss holds for part of the devices.
RESUMABLE_ANY_MESH = ("mesh.data", "mesh.fsdp", "mesh.expert", "moe.placement", "moe.exchange")


def default_config() -> ml_collections.ConfigDict:
    """The defaults as a ConfigDict: the start of every file in configs/."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def from_dict(values: dict) -> Config:
    """A checked Config from nested plain values (a ConfigDict's to_dict(), or config.json). Raises UserError.

    A value in RENAMED_VALUES is replaced by its new one, with one line on stderr per process.
    """
    return _build(Config, values, "")


def to_flat_dict(config: Config) -> dict:
    """{"section.field": value}: for diffs between two configs."""
    return {path: get_option(config, path) for path, _ in fields()}


def differences(old: Config, new: Config) -> list[str]:
    """Lines `name: old -> new` for every value that differs."""
    new_values = to_flat_dict(new)
    return [
        f"{path}: {value!r} -> {new_values[path]!r}"
        for path, value in to_flat_dict(old).items()
        if value != new_values[path]
    ]


def _build(cls, values, prefix):
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(known)}"
            raise UserError(f"unknown option {prefix}{name}; {hint}")
    missing = [prefix + name for name in known if name not in values]
    if missing:
        raise UserError(f"config lacks {', '.join(missing)}")
    return cls(**{name: _cast(known[name], value, prefix + name) for name, value in values.items()})


def _cast(field, value, path):
    if dataclasses.is_dataclass(field.type):
        return _build(field.type, value, path + ".")
    if typing.get_origin(field.type) is tuple:
        item = typing.get_args(field.type)[0]
        if typing.get_origin(item) is tuple:  # data.mixture
            if not isinstance(value, (tuple, list)) or not all(
                isinstance(v, (tuple, list))
                and len(v) == 2
                and _is(v[0], str)
                and (_is(v[1], float) or _is(v[1], int))
                for v in value
            ):
                raise UserError(f'{path}={value!r} must be (("DIR", weight), ...)')
            return tuple((name, float(weight)) for name, weight in value)
        if not isinstance(value, (tuple, list)) or not all(_is(v, item) for v in value):
            raise UserError(f"{path}={value!r} must be a tuple of {item.__name__}")
        return tuple(value)
    if field.type is float and _is(value, int):
        return float(value)
    if not _is(value, field.type):
        raise UserError(f"{path}={value!r} must be of type {field.type.__name__}")
    return renamed(value, path)


def _is(value, kind):
    return isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
