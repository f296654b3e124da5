"""The date that a chat template prints: one for each tokenizer in a store, so that no artifact mixes two."""

from datetime import UTC, datetime
from pathlib import Path

from cpo_pipe.data.models.chat import ChatTemplate, Conversation
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.data.store import ArtifactWriter, Store

KIND = "chat-dates"
FILE = "date.txt"

_PRINTS_DATES = b"strftime_now"
"""The one function of chat templates that knows the time."""
_UNLIKE = datetime(2001, 1, 2, 3, 4, 5), datetime(2022, 12, 30, 16, 17, 18)
"""Two times that differ in all parts."""


def chat_date(tokenizer: TokenizerFiles, store: Store) -> str | None:
    """Return the date (ISO 8601) to render a tokenizer's chat template with; None where it prints none.

    It is the day on which the store first needed it. It does not change, so that later texts match the stored ones.

    Raises:
        InputError: the tokenizer cannot be loaded, or has no chat template after all.
    """
    if not _may_print_a_date(tokenizer.path):
        return None
    artifact = store.artifact(KIND, {"tokenizer": tokenizer.fingerprint})

    def write_date(writer: ArtifactWriter) -> None:
        today = datetime.now(UTC).astimezone().date().isoformat() if _prints_a_date(tokenizer) else ""
        (writer.path / FILE).write_text(today)

    artifact.make(write_date)
    return (artifact.path / FILE).read_text() or None


def _may_print_a_date(folder: Path) -> bool:
    """Return whether files of a tokenizer mention the time; nothing is loaded."""
    files = [folder / name for name in ("chat_template.jinja", "tokenizer_config.json")]
    return any(_PRINTS_DATES in file.read_bytes() for file in files if file.is_file())


def _prints_a_date(tokenizer: TokenizerFiles) -> bool:
    loaded, asked = tokenizer.load(), Conversation.of_text("a")
    one, other = (ChatTemplate(loaded, time.isoformat()).prompt(asked) for time in _UNLIKE)
    return one != other
