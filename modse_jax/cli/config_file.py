"""Loads the config file that --config names, and reports in one line what is wrong with it."""

import pathlib
import traceback
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from modse_jax.errors import UserError

NAME = "config"

HINT = "a config file is Python, with a function get_config() like that of configs/tiny.py"


def define_flag(help_text: str) -> None:
    """Defines --config, whose options are overridden by --config.section.option=value."""
    config_flags.DEFINE_config_file(NAME, None, help_text, lock_config=True)
    flag: Any = flags.FLAGS[NAME]
    flag.parser = _Parser(NAME, lock_config=True)


class _Parser(config_flags.config_flags.ConfigFileFlagParser):
    """Parses the value of --config: FILE, or FILE:ARGUMENT for a get_config with an argument."""

    def parse(self, path: str) -> Any:
        """Returns the config.

        Raises:
            UserError: the file is not Python, fails, or returns something else than a ConfigDict.
        """
        file = pathlib.Path(path.partition(":")[0])
        if not file.is_file():
            return super().parse(path)  # reports it when the config is read
        if file.suffix == ".json":
            raise UserError(
                f"--{NAME}={path} is a saved config, which no run can start from; {HINT}. The "
                "command that started a run is in its environment.json"
            )
        try:
            config = super().parse(path)
        except UserError as error:
            raise UserError(f"--{NAME}={path}: {error}") from None
        except SyntaxError as error:
            raise UserError(
                f"--{NAME}={path} is not Python: {error.msg} ({error.filename}, line "
                f"{error.lineno}); {HINT}"
            ) from None
        except Exception as error:  # a config file is the user's code and may raise anything
            # ml_collections raises some errors again with a traceback in their message.
            # The original error is reported.
            cause = error.__context__ or error
            if "get_config() takes 0 positional arguments" in str(cause):
                raise UserError(
                    f"--{NAME}={path}: this config takes no argument; remove the colon and what "
                    "follows it"
                ) from None
            raise UserError(
                f"--{NAME}={path} failed: {type(cause).__name__}: {cause}{_location(cause)}; {HINT}"
            ) from None
        if not isinstance(config, ConfigDict):
            raise UserError(
                f"--{NAME}={path}: get_config() returned {type(config).__name__}, not a "
                f"ConfigDict; {HINT}"
            )
        return config


def _location(error: BaseException) -> str:
    """Returns the place in the user's code that an error comes from; "" if it is elsewhere."""
    places = [
        f" ({frame.filename}, line {frame.lineno})"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<")
        if "ml_collections" not in frame.filename and "importlib" not in frame.filename
    ]
    return places[-1] if places else ""
