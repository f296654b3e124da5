"""The date that a chat template prints: one for each tokenizer in a store, so that no artifact mixes two."""

from datetime import UTC, datetime
from pathlib import Path

from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.data.store import ArtifactWriter, Store

KIND = "chat-dates"
FILE = "date.txt"

_PRINTS_DATES = b"strftime_now"
"""The one function of chat templates that knows the time."""


def chat_date(tokenizer: TokenizerFiles, store: Store) -> str | None:
    """Return the date (ISO 8601) to render a tokenizer's chat template with; None where it prints none.

    It is the day on which the store first needed it. It does not change, so that later texts match the stored ones.
    A template may print it for some conversations only, such as those with tools.
    """
    if not _may_print_a_date(tokenizer.path):
        return None
    artifact = store.artifact(KIND, {"tokenizer": tokenizer.fingerprint})

    def write_date(writer: ArtifactWriter) -> None:
        (writer.path / FILE).write_text(datetime.now(UTC).astimezone().date().isoformat())

    artifact.make(write_date)
    return (artifact.path / FILE).read_text() or None  # older versions wrote an empty file for some templates


def _may_print_a_date(folder: Path) -> bool:
    """Return whether files of a tokenizer mention the time; nothing is loaded."""
    files = [folder / name for name in ("chat_template.jinja", "tokenizer_config.json")]
    return any(_PRINTS_DATES in file.read_bytes() for file in files if file.is_file())
