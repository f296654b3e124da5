"""The documentation that every Python carries, as articles: the standard library's docstrings and pydoc's topics.

Nothing is downloaded, and no module is imported for its docstrings: the sources are parsed.
"""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from copy import copy
from functools import cache
from itertools import chain, tee
from pathlib import Path

from cpo_pipe.data.fingerprint import digest, sha256_file

_RULES = 1
"""Raise when the cleaning below changes what it returns: it is part of the identity."""

# Tests and demos, foreign code, and tables that merely look like modules.
_SKIPPED = {
    "test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "site-packages", "dist-packages", "ensurepip",
    "encodings", "pydoc_data", "__pycache__", "lib-dynload", "__phello__",
}  # fmt: skip
_MIN_WORDS = 5
"""Shorter paragraphs are headings, signatures and list labels."""
_MIN_PROSE = 0.8
"""Letters, spaces and common punctuation among the characters of prose; code has fewer."""

_DOCTEST = re.compile(r"^\s*(>>>|\.\.\. )", re.MULTILINE)
_CODE = re.compile(
    r"::=|[\])]\s=\s|;$|[{}\\]"
    r"|^\s*(\$ |% |#!|import \w+$|from \S+ import |def \w+\(|class \w+[(:]|@\w|(if|for|while|with) .*:$)"
)
_ROLE = re.compile(r":[a-z:]+:`~?([^`]*)`")
_NOT_PROSE = re.compile(r"[^A-Za-z ,.'\"()\n-]")
_TABLE = re.compile(r"\S {3,}\S|[-=+*~^_#]{4,}")


@cache
def identity() -> str:
    """Return the hash of the sources that the articles are made from, and of the rules that clean them."""
    root = _root()
    files = [*_sources(root), *sorted((root / "pydoc_data").glob("*.py"))]
    return digest({"rules": _RULES, "files": [[str(file.relative_to(root)), sha256_file(file)] for file in files]})


def collect() -> Iterator[str]:
    """Yield the articles: one per module with prose in its docstrings, in the order of paths, then one per topic."""
    return copy(_first())


@cache
def _first() -> Iterator[str]:
    """Return an iterator that stays at the first article; its copies share what each of them has read."""
    (first,) = tee(_articles(), 1)
    return first


def _articles() -> Iterator[str]:
    yielded = {""}
    for article in chain(_modules(_root()), (_clean(text) for _, text in sorted(_topics().items()))):
        if article not in yielded:
            yielded.add(article)
            yield article


def _modules(root: Path) -> Iterator[str]:
    """Yield the prose of each module's docstrings, without those that an earlier module has too."""
    seen: set[str] = set()
    for path in _sources(root):
        texts = dict.fromkeys(_clean(docstring) for docstring in _docstrings(path))
        yield "\n\n".join(text for text in texts if text and text not in seen)
        seen.update(texts)


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


@cache
def _sources(root: Path) -> list[Path]:
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (path for path in paths if not _SKIPPED.intersection(path.parts) and not path.parts[0].startswith("config-"))
    return [root / path for path in sorted(kept)]


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave pydoc's data out
        return {}
    return dict(topics)


def _docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a file, outermost first, in the order of the source."""
    try:
        with warnings.catch_warnings(action="ignore"):  # old modules have invalid escapes
            tree = ast.parse(path.read_bytes())
    except SyntaxError:  # the standard library ships a few files that are bad on purpose
        return
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop(0)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
        if isinstance(node, (ast.Module, ast.ClassDef, ast.If, ast.Try)):
            pending = [*ast.iter_child_nodes(node), *pending]


def _clean(text: str) -> str:
    """Return the prose of a docstring or topic: its paragraphs, each on one line."""
    paragraphs = (_prose(paragraph) for paragraph in re.split(r"\n\s*\n", text.expandtabs()))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def _prose(paragraph: str) -> str:
    """Return a paragraph on one line without markup; empty where it is code, a table or a heading."""
    doctest = _DOCTEST.search(paragraph)
    lines = paragraph[: doctest.start() if doctest else None].strip("\n")
    if any(_TABLE.search(line.lstrip()) or _CODE.search(line) for line in lines.split("\n")):
        return ""
    line = _ROLE.sub(r"\1", " ".join(lines.split())).replace("``", "").replace("`", "").replace("*", "")
    is_prose = len(_NOT_PROSE.findall(line)) <= (1 - _MIN_PROSE) * len(line)
    return line if is_prose and len(line.split()) >= _MIN_WORDS else ""
