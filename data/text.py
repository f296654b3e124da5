r"""Text that others wrote, made safe to show on a terminal, in a log line and in Markdown.

Control characters can move the cursor, set the window's title or overwrite a line; direction characters reorder the
text around them. All text for people goes through `say` or the log (see `src/cpo_pipe/terminal.py`), or through
`markdown` and `fenced` into files.
"""

import difflib
import re
from collections.abc import Iterable
from itertools import islice
from typing import TextIO

from cpo_pipe.data.config import LONGEST_NAME


def nearest(name: str, known: Iterable[str], kind: str = "") -> str:
    """Return `did you mean X?` for the known name that is most like this one; an empty string if none is."""
    if len(name) > LONGEST_NAME:  # the comparison takes time that grows with the square of the lengths
        return ""
    near = difflib.get_close_matches(name, [other for other in known if len(other) <= LONGEST_NAME], n=1)
    return f"did you mean {kind}{near[0]}?" if near else ""


def abridged(text: str, length: int = 80) -> str:
    """Return the start of a text, on one line."""
    text = " ".join(text.splitlines())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def listed(names: Iterable[str]) -> str:
    """Return the first names, for messages."""
    first = [abridged(name) for name in islice(names, 21)]
    return ", ".join(first[:20] + ["…"] * (len(first) > 20)) or "none"


# Characters that are invisible, move the cursor or change the direction of text: shown by name.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)
_MARKUP = re.compile(
    r"""([\\`*|]             # escapes, code, emphasis, table cells
    | (?<!\w)_ | _(?!\w)    # emphasis, but not inside a word
    | \](?=[(\[:])          # links and their definitions
    | ~(?=~) | ^[#>+=-])     # what is struck out; headings, quotations, lists, rules
    """,
    re.VERBOSE,
)
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")


def visible(text: str) -> str:
    r"""Return a text with its control and direction characters shown as `\x1b`, and `\r\n` as a line break."""
    lines = text.replace("\r\n", "\n")
    return _INVISIBLE.sub(lambda match: match[0].encode("unicode_escape").decode(), lines)


def one_line(text: str, length: int | None = None) -> str:
    """Return a text as one visible line without runs of spaces, cut to `length` characters where one is given."""
    line = visible(re.sub(r"[ \t\r\n]+", " ", text.strip(" \t\r\n")))
    return line if length is None or len(line) <= length else f"{line[: length - 1]}…"


def markdown(text: str) -> str:
    """Return a text as one line of Markdown that shows it literally: a paragraph, or a cell of a table."""
    escaped = _NUMBERED.sub(r"\1\\\2", _MARKUP.sub(r"\\\1", one_line(text)))
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


def fenced(text: str, language: str) -> str:
    """Return a text as a block of code in Markdown, between fences that are longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{visible(text)}{'' if text.endswith(chr(10)) else chr(10)}{fence}"


def say(text: str = "", file: TextIO | None = None) -> None:
    """Print a text for the user, on the standard output unless another file is given."""
    print(visible(text), file=file, flush=True)


def say_prose(text: str) -> None:
    """Print sentences for the user; on a terminal, lines break between words."""
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False)
    if console.is_terminal:
        console.print(visible(text))
    else:
        say(text)
