"""Lets every command print any text on a console of any encoding."""

import io
import sys


def escape_unprintable() -> None:
    """From now on, characters that a console cannot show are printed as escapes, such as \\u4e16.

    Otherwise a sample with such a character, or a path that is not UTF-8, would end the command
    after its work, with `LC_ALL=C` or `PYTHONIOENCODING=ascii`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
