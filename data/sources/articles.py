"""Articles of text files."""

import re
from collections.abc import Sequence
from io import BufferedReader
from itertools import chain, pairwise

from cpo_pipe.data.sources.rows import TEXT_COLUMN, ColumnRequest, Refusal, Row, Stream

_TITLE = re.compile(rb" = [^=\s](.*[^=\s])? = \r?\n?")


def read_articles(stream: BufferedReader, label: str, request: ColumnRequest) -> Stream:
    """Yield the articles of a text file: in WikiText's style, or else the whole file as one.

    WikiText begins an article with a line ` = Title = ` between blank lines (` = = Section = = ` is not a title).

    Raises:
        InputError: another column than that of the article is required.
    """
    if "prompt" in request.required:
        of_data = (request.columns_key or "").startswith("data.")
        fix = "set data.preset: text" if of_data else "give a file of another format"
        raise request.error(f"a .txt file holds articles, not pairs; {fix}")
    request.require([TEXT_COLUMN])
    article: list[bytes] = []
    start, after_blank = 1, True
    for number, (line, following) in enumerate(pairwise(chain(stream, [b""])), 1):
        if after_blank and _TITLE.fullmatch(line) and not following.strip():
            yield from _article(f"{label}:{start}", article)
            article, start = [], number
        article.append(line)
        after_blank = not line.strip()
    yield from _article(f"{label}:{start}", article)


def _article(label: str, lines: Sequence[bytes]) -> Stream:
    content = b"".join(lines).strip()
    if not content:
        return
    try:
        yield Row(label, {TEXT_COLUMN: content.decode("utf-8-sig")})
    except UnicodeDecodeError:
        yield Refusal(label, "not UTF-8", content[:1000].decode(errors="backslashreplace"))
