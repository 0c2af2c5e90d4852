"""TODO"""


class UserError(Exception):
    """What the user can mend: shown as one line, exit code 2, nothing written."""


class RunError(Exception):
    """What stops a run that had begun: shown as one line, exit code 1. What was saved before is sound."""
