import pytest

from cpo_pipe.data.sources import python_docs as pydocs


def test_paragraphs_become_lines_without_code_markup_and_headings():
    docstring = """Return the *largest* item of an iterable,
    or of two or more :class:`~builtins.object` arguments.

    Usage
    *****

    >>> max([1, 2])
    2

    for x in y:
        print(x, file={})

    Short.

    The text before an example is kept whole:
    >>> max(3, 4)
    """
    assert pydocs._clean(docstring) == (
        "Return the largest item of an iterable, or of two or more builtins.object arguments.\n"
        "The text before an example is kept whole:"
    )


def test_docstrings_are_found_without_importing_in_source_order(tmp_path):
    (tmp_path / "m.py").write_text(
        '"""Module."""\nraise SystemExit\ndef f():\n    """F."""\n    def inner():\n        """Hidden."""\n'
        'class C:\n    """C."""\n    def m(self):\n        """M."""\nif True:\n    async def g():\n        """G."""\n'
    )
    assert list(pydocs._docstrings(tmp_path / "m.py")) == ["Module.", "F.", "C.", "M.", "G."]


def test_file_that_does_not_parse_gives_nothing(tmp_path):
    (tmp_path / "m.py").write_text('"""Module."""\nprint "old"\n')
    assert list(pydocs._docstrings(tmp_path / "m.py")) == []


@pytest.mark.slow
def test_corpus_of_this_python():
    articles = [*pydocs.collect()]
    assert sum(map(len, articles)) > 1_000_000
    assert len(set(articles)) == len(articles) > 300
    assert not any(">>>" in article for article in articles)
    # textwrap's first function, and the `assert` statement of the language reference
    assert any("Wrap a single paragraph of text, returning a list of wrapped lines." in text for text in articles)
    assert any(text.startswith("Assert statements are a convenient way to insert debugging") for text in articles)
    assert len(pydocs.identity()) == 32


def test_same_docstring_is_kept_once(tmp_path, monkeypatch):
    text = "This sentence stands in both of the modules."
    for name in ("b", "a"):
        (tmp_path / f"{name}.py").write_text(
            f'"""{text}"""\n\ndef {name}():\n    """Only in the module {name}, and nowhere."""'
        )
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.py").write_text('"""Tests are not read by anybody at all."""')
    monkeypatch.setattr(pydocs, "_root", lambda: tmp_path)
    monkeypatch.setattr(pydocs, "_topics", lambda: {"z": "The last of the topics is here.", "y": text})
    assert tuple(pydocs._articles()) == (
        f"{text}\n\nOnly in the module a, and nowhere.",
        "Only in the module b, and nowhere.",
        text,
        "The last of the topics is here.",
    )
    before = pydocs.identity.__wrapped__()
    (tmp_path / "a.py").write_text('"""Changed."""')
    assert pydocs.identity.__wrapped__() != before
