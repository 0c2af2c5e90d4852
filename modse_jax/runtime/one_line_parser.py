"""An argument parser for the command-line tools that reports errors in one line."""

import argparse
from typing import NoReturn

EXIT_BAD_INPUT = 2


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` that prints a bad argument as one line and exits with code 2.

    The usage text that argparse prints by default would hide the message in logs.
    """

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"error: {message} (see --help)\n")
