"""The ConfigDict that config files fill in. It accepts the old names of options as well.

An old name reads and writes the option that it became, so that the last assignment wins, whichever
name it uses. Files in configs/, `--config.SECTION.OPTION=VALUE` flags and `update()` all assign
through `ConfigDict.__setitem__`.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from modse_jax.config.migration import describe_move, moved_options, report_once


class OptionDict(ml_collections.ConfigDict):
    """A ConfigDict of options, or one of its sections.

    Attributes:
        _moved: {old name in this section: (the entire config, old path, new path)}.
        _is_whole: this is an entire config, whose sections accept old names.
    """

    _moved: Mapping[str, tuple["OptionDict", str, str]] = {}
    _is_whole = False

    def accept_old_names(self) -> None:
        """Lets the sections of this entire config accept the old names of their options."""
        by_section: dict[str, dict[str, tuple[OptionDict, str, str]]] = {}
        for old, new in moved_options().items():
            section, _, name = old.rpartition(".")
            by_section.setdefault(section, {})[name] = self, old, new
        for section, moved in by_section.items():
            target = self if not section else self[section]
            object.__setattr__(target, "_moved", moved)
        object.__setattr__(self, "_is_whole", True)

    def __getitem__(self, key: Any) -> Any:
        if key not in self._moved:
            return super().__getitem__(key)
        section, name = self._target(key)
        return section[name]

    def __setitem__(self, key: Any, value: Any) -> None:
        if key not in self._moved:
            super().__setitem__(key, value)
            return
        section, name = self._target(key)
        section[name] = value

    def get_type(self, key: Any) -> type:
        """Returns the type of an option. Flags are parsed by it."""
        if key not in self._moved:
            return super().get_type(key)
        section, name = self._target(key)
        return section.get_type(name)

    def copy_and_resolve_references(self, visit_map: dict | None = None) -> "OptionDict":
        """Returns a copy with values in place of references; it accepts old names too."""
        copied = super().copy_and_resolve_references(visit_map)
        if self._is_whole:
            copied.accept_old_names()
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fills in a copy made by `copy` or `pickle`; it accepts old names too."""
        super().__setstate__(state)
        if state.get("_is_whole"):
            self.accept_old_names()

    def _target(self, key: str) -> tuple["OptionDict", str]:
        """Returns (section, name) of the option that an old name became, and reports it."""
        config, old, new = self._moved[key]
        report_once(describe_move(old, new))
        section, _, name = new.rpartition(".")
        return (config[section] if section else config), name


def build_option_dict(values: Mapping[str, Any]) -> OptionDict:
    """Returns nested values of options as an OptionDict that accepts old names."""
    config = OptionDict()
    for name, value in values.items():
        config[name] = OptionDict(value) if isinstance(value, Mapping) else value
    config.accept_old_names()
    return config
