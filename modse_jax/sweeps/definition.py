"""The language of sweep files: named arms made by product, zip_axes and chain.

A file of configs/sweeps/ has a function `get_sweep` that returns a `Sweep`:

    def get_sweep():
        shapes = choices({
            "dense": {"model.dense_width": 192},
            "n32": {"moe.num_experts": 32, "moe.top_k": 4, "moe.width": 48},
        })
        rates = axis("optimizer.learning_rate", (1e-3, 3e-3, 1e-2))
        return Sweep(
            base=tiny.get_config(),
            arms=product(shapes, rates, seeds(0, 1)),
            fixed={"tokens": 0, "flops_per_token": 0.01},
        )
"""

import dataclasses
import importlib.util
import itertools
import pathlib
import traceback
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from modse_jax.config.loading import from_dict, override_options
from modse_jax.config.options import Config
from modse_jax.errors import UserError, describe_exception


class Arm(NamedTuple):
    """One run of a sweep: a name, and what differs from the base config.

    Attributes:
        name: its name in tables.
        options: {"section.option": value} to override.
        config: the config to override, in place of the base config of the sweep.
    """

    name: str
    options: Mapping[str, Any]
    config: Config | None = None


class ResolvedArm(NamedTuple):
    """An arm with its complete config."""

    name: str
    config: Config


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The arms of a sweep, and what they have in common.

    Attributes:
        arms: the arms.
        base: the config that arms override; None if every arm has its own.
        fixed: {quantity: largest relative difference}, what the arms are matched on; quantities are
            those of `matching.QUANTITIES`. {"tokens": 0} requires equal numbers of tokens.
        fixed_within: options that divide the arms into groups, such as "model.dim". Only the arms
            of a group, in which these options are equal, must match.
        compares_shapes: the sweep is to say which shape of a model is better. If shapes are trained
            at fewer than three learning rates, a warning says what that may hide.
    """

    arms: Sequence[Arm]
    base: ConfigDict | None = None
    fixed: Mapping[str, float] = dataclasses.field(default_factory=dict)
    fixed_within: Sequence[str] = ()
    compares_shapes: bool = True


def axis(option: str, values: Sequence[Any]) -> list[Arm]:
    """Returns an arm for every value of an option, named as "learning_rate=0.001"."""
    label = option.rpartition(".")[2]
    return [Arm(f"{label}={_format_value(value)}", {option: value}) for value in values]


def choices(options: Mapping[str, Mapping[str, Any]]) -> list[Arm]:
    """Returns arms from {name: {"section.option": value}}."""
    return [Arm(name, dict(values)) for name, values in options.items()]


def from_configs(configs: Mapping[str, Config]) -> list[Arm]:
    """Returns arms from {name: complete config}."""
    return [Arm(name, {}, config) for name, config in configs.items()]


def seeds(*values: int) -> list[Arm]:
    """Returns an arm for every seed, which sets `seed` and `data.shuffle_seed`.

    Arms of one seed read the same data in the same order, and the initial weights that do not
    depend on their shape are the same: those of embeddings and attention.
    """
    return [Arm(f"seed={value}", {"seed": value, "data.shuffle_seed": value}) for value in values]


def product(*axes: Sequence[Arm]) -> list[Arm]:
    """Returns an arm for every combination of one arm of each axis; the last axis varies fastest.

    Raises:
        UserError: two axes set the same option.
    """
    return [_combine(arms) for arms in itertools.product(*axes)]


def zip_axes(*axes: Sequence[Arm]) -> list[Arm]:
    """Returns an arm for the first arms of all axes, one for the second ones, and so on.

    Raises:
        UserError: the axes have different lengths, or set the same option.
    """
    lengths = sorted({len(arms) for arms in axes})
    if len(lengths) > 1:
        raise UserError(
            f"zip_axes: the axes have {' and '.join(map(str, lengths))} arms; give all the same "
            "number, or use product"
        )
    return [_combine(arms) for arms in zip(*axes)]


def chain(*groups: Sequence[Arm]) -> list[Arm]:
    """Returns the arms of all groups, one group after the other."""
    return list(itertools.chain(*groups))


def resolve_arms(sweep: Sweep) -> list[ResolvedArm]:
    """Returns all arms with their configs.

    Raises:
        UserError: there are no arms, an option is unknown or has a bad value, or two arms have the
            same name or the same config. The message names the arms.
    """
    if not sweep.arms:
        raise UserError("the sweep has no arms; return at least one from get_sweep()")
    base = None if sweep.base is None else from_dict(sweep.base.to_dict())
    resolved = [_resolve(arm, base) for arm in sweep.arms]
    first_by_name: dict[str, ResolvedArm] = {}
    first_by_config: dict[Config, ResolvedArm] = {}
    for arm in resolved:
        if arm.name in first_by_name:
            raise UserError(f"two arms are named {arm.name!r}; give each its own name")
        if arm.config in first_by_config:
            raise UserError(
                f"the arms {first_by_config[arm.config].name!r} and {arm.name!r} have the same "
                "config; remove one of them"
            )
        first_by_name[arm.name] = arm
        first_by_config[arm.config] = arm
    return resolved


def load_sweep(path: str) -> Sweep:
    """Runs a sweep file and returns what its `get_sweep` returns.

    Raises:
        UserError: the file is missing, fails, or returns something else.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"--sweep={path} is not a file; sweep files are in configs/sweeps/")
    spec = importlib.util.spec_from_file_location("modse_sweep_file", file.absolute())
    if spec is None or spec.loader is None:
        raise UserError(f"--sweep={path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        sweep = _call_get_sweep(module, path)
    except UserError:
        raise
    except Exception as error:  # a sweep file is the user's code and may raise anything
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"--sweep={path} failed: {type(error).__name__}: {describe_exception(error)} "
            f"({line.filename}, line {line.lineno})"
        ) from None
    if not isinstance(sweep, Sweep):
        raise UserError(f"--sweep={path}: get_sweep() returned {type(sweep).__name__}, not Sweep")
    return sweep


def _call_get_sweep(module: types.ModuleType, path: str) -> Any:
    if not hasattr(module, "get_sweep"):
        raise UserError(f"--sweep={path} has no function get_sweep; define one that returns Sweep")
    return module.get_sweep()


def _resolve(arm: Arm, base: Config | None) -> ResolvedArm:
    config = arm.config or base
    if config is None:
        raise UserError(f"arm {arm.name!r} has no config, and the sweep no base config; set base=")
    try:
        return ResolvedArm(arm.name, override_options(config, arm.options))
    except UserError as error:
        raise UserError(f"arm {arm.name!r}: {error}") from None


def _combine(arms: Sequence[Arm]) -> Arm:
    """Returns one arm with the options of several."""
    name = " ".join(arm.name for arm in arms)
    options: dict[str, Any] = {}
    config = None
    for arm in arms:
        repeated = sorted(set(options) & set(arm.options))
        if repeated:
            raise UserError(f"arm {name!r}: two axes set {repeated[0]}; leave it out of one")
        if config is not None and arm.config is not None:
            raise UserError(f"arm {name!r}: two axes are complete configs; combine only one")
        options.update(arm.options)
        config = arm.config or config
    return Arm(name, options, config)


def _format_value(value: Any) -> str:
    return format(value, "g") if isinstance(value, float) else str(value)
