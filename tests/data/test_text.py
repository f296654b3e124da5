"""Foreign text on terminals, in the log and in Markdown."""

import ast
from pathlib import Path

import pytest
import yaml

from cpo_pipe.data.text import fenced, markdown, one_line, say, say_prose, visible
from tests.support.hostile import HOSTILE, RAW, SHOWN

PACKAGES = [Path(__file__).parents[2] / name for name in ("data", "pipeline", "trainer", "eval")]


def test_what_has_no_shape_is_shown_by_name() -> None:
    assert visible(HOSTILE) == SHOWN
    assert visible("\ttwo\r\nlines\n") == "\ttwo\nlines\n"
    assert visible("é 語 👩\u200d💻 \\ ~") == "é 語 👩\u200d💻 \\ ~"
    assert visible(visible(HOSTILE)) == SHOWN
    assert not RAW.search(visible("".join(map(chr, range(256)))))


def test_one_line() -> None:
    assert one_line("  two \r\n\t lines\n") == "two lines"
    assert one_line("a\u2028b\x85c\x0bd") == r"a\u2028b\x85c\x0bd"
    assert one_line("12345", 5) == "12345"
    assert one_line("123456", 5) == "1234…"


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("snake_case 0.5 [0.1, 0.2] 2 < 3", "snake_case 0.5 [0.1, 0.2] 2 &lt; 3"),
        ("a|b", r"a\|b"),
        ("`code` *b* _i_ ~~s~~", r"\`code\` \*b\* \_i\_ \~~s\~~"),
        ("[x](http://evil) ![y](z) [q]: r", r"[x\](http://evil) ![y\](z) [q\]: r"),
        ("<script>alert(1)</script> &#x202e;", "&lt;script>alert(1)&lt;/script> &amp;#x202e;"),
        ("# title", r"\# title"),
        ("- item", r"\- item"),
        ("1. item", r"1\. item"),
        ("one\n\n# two", "one # two"),
        ("\x1b[2J\u202e", r"\\x1b[2J\\u202e"),
    ],
)
def test_markdown_shows_a_text_as_it_is(text: str, written: str) -> None:
    assert markdown(text) == written


def test_nothing_in_a_block_of_code_ends_it() -> None:
    text = "a\n```\n# b\n````\nc\x1b"
    block = fenced(text, "yaml")
    assert block == "`````yaml\na\n```\n# b\n````\nc\\x1b\n`````"
    assert fenced("a: 1\n", "yaml") == "```yaml\na: 1\n```"
    assert yaml.safe_load(visible('a: "x\u202ey"')) == {"a": "x\u202ey"}, "within double quotes it is YAML's own escape"


def test_what_is_said_can_do_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE + "\ud800")
    say()
    assert capsys.readouterr().out == SHOWN + "\\ud800\n\n"


def test_nothing_else_prints() -> None:
    """All that people see goes through `say`, the log, or a table of texts that are visible already."""
    printing = [
        f"{file.parent.name}/{file.name}"
        for package in PACKAGES
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and (ast.unparse(node.func) in ("print", "traceback.print_exc", "warnings.showwarning", "typer.echo")
             or ast.unparse(node.func).startswith(("sys.stdout.write", "sys.stderr.write")))
    ]  # fmt: skip
    assert printing == ["data/text.py"]


def test_sentences_break_between_words_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = "systems trained on that ranking [0.1, 0.2] have an advantage \x1b[2J"
    say_prose(sentence)
    assert capsys.readouterr().out == visible(sentence) + "\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    say_prose(sentence)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 20
    assert " ".join(line.rstrip() for line in lines) == visible(sentence)
