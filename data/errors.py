"""The two kinds of failure a user sees, each one line on screen: theirs (exit 2) and the run's (exit 1)."""

from cpo_pipe.data.text import one_line

LONGEST_REASON = 300
"""Characters of a library's message that are shown."""


class InputError(Exception):
    """A user's mistake. The message names the field, its value, the rule and the fix; the exit status is 2."""


class MissingInput(InputError):
    """A stage's input is not in the store. The message names the command that makes it."""


class RunError(Exception):
    """A failure while running that no change of the input text explains; the exit status is 1."""


def cause(error: BaseException, length: int | None = LONGEST_REASON) -> str:
    """Return what a library's error says, in one line: its own message, and that of the error which first caused it."""
    chain = [error]
    while (before := chain[-1].__cause__) is not None and before not in chain:
        chain.append(before)
    said, why = _message(error), _message(chain[-1])
    return one_line(said if why in said else f"{said}: {why}", length)


def _message(error: BaseException) -> str:
    """Return the first line of an error's message; where that only announces the next one, that too."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, KeyError):  # whose message is the bare key
        return f"{type(error).__name__}{f': {lines[0]}' if lines else ''}"
    count = 1
    while count < len(lines) and lines[count - 1].endswith(":"):
        count += 1
    return " ".join(lines[:count]).rstrip(".")
