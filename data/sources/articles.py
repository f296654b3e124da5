"""Articles of text files."""

import re
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path

from cpo_pipe.data.sources.rows import TEXT_COLUMN, Refusal, Row, Stream

_TITLE = re.compile(rb" = [^=\s](.*[^=\s])? = \r?\n?")


def read_articles(path: Path) -> Stream:
    """Yield the articles of a text file: in WikiText's style, or else the whole file as one.

    WikiText begins an article with a line ` = Title = ` between blank lines (` = = Section = = ` is not a title).
    """
    article: list[bytes] = []
    start, after_blank = 1, True
    with path.open("rb") as file:
        for number, (line, following) in enumerate(pairwise(chain(file, [b""])), 1):
            if after_blank and _TITLE.fullmatch(line) and not following.strip():
                yield from _article(f"{path.name}:{start}", article)
                article, start = [], number
            article.append(line)
            after_blank = not line.strip()
    yield from _article(f"{path.name}:{start}", article)


def _article(label: str, lines: Sequence[bytes]) -> Stream:
    content = b"".join(lines).strip()
    if not content:
        return
    try:
        yield Row(label, {TEXT_COLUMN: content.decode("utf-8-sig")})
    except UnicodeDecodeError:
        yield Refusal(label, "not UTF-8", content[:1000].decode(errors="backslashreplace"))
