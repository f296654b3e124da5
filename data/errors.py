"""The two kinds of failure a user sees, each one line on screen: theirs (exit 2) and the run's (exit 1)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cpo_pipe.data.text import one_line

LONGEST_REASON = 300
"""Characters of a library's message that are shown."""


class InputError(Exception):
    """A user's mistake. The message names the field, its value, the rule and the fix; the exit status is 2."""


class Problems(InputError):
    """Several mistakes of a user that were found together, each a line of its own."""

    def __init__(self, messages: Sequence[str]):
        super().__init__("\n".join(messages))
        self.messages = list(messages)


class MissingInput(InputError):
    """A stage's input is not in the store. The message names the command that makes it."""


class RunError(Exception):
    """A failure while running that no change of the input text explains; the exit status is 1."""


class Findings:
    """Collects what is wrong, so that a user sees all of it at once."""

    def __init__(self) -> None:
        self._messages: dict[str, None] = {}  # each once, in order

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep the mistakes that a block raises. An input that an earlier stage will make is not a mistake."""
        try:
            yield
        except MissingInput:
            pass
        except InputError as error:
            messages = error.messages if isinstance(error, Problems) else [str(error)]
            self._messages.update(dict.fromkeys(messages))

    def report(self) -> None:
        """Do nothing if nothing was found.

        Raises:
            InputError: something was.
        """
        if self._messages:
            raise Problems([*self._messages])


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
