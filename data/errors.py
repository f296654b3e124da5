"""The two kinds of failure a user sees, each one line on screen: theirs (exit 2) and the run's (exit 1)."""


class InputError(Exception):
    """A user's mistake. The message names the field, its value, the rule and the fix; the exit status is 2."""


class MissingInput(InputError):
    """A stage's input is not in the store. The message names the command that makes it."""


class RunError(Exception):
    """A failure while running that no change of the input text explains; the exit status is 1."""
