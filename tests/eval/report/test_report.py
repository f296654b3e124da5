"""The report as a page: it needs nothing but itself, and text of models stays text."""

import base64
import hashlib
import re
from pathlib import Path

import pyarrow as pa
import pytest

from cpo_pipe.data.text import visible
from cpo_pipe.eval.report.terminal import print_quality
from tests.support.report_data import HOSTILE, make_data, quality_table, strategy
from tests.support.report_page import render, unpacked


def test_text_of_models_stays_text(tmp_path: Path) -> None:
    html, page = render(tmp_path, make_data(HOSTILE))
    _, harmless = render(tmp_path, make_data("harmless"))
    assert page.tags == harmless.tags
    assert page.tags.count("script") == 2
    assert "<script>alert(1)</script>" not in html
    assert (
        page.text.count("<script>alert(1)</script>") == 6
    )  # in a group, which shows the prompt twice, and in the recipe
    assert "{{ 7 * 7 }}" in page.text
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_control_and_direction_characters_are_escaped(tmp_path: Path) -> None:
    html, _ = render(tmp_path, make_data(HOSTILE))
    hidden = re.compile("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]")
    assert not hidden.search(html)
    _, examples = unpacked(html)
    assert not hidden.search("".join([*examples[0]["outputs"], examples[0]["prompt"], examples[0]["target"]]))
    assert "\\x1b[31m\\x00 \\u202egnihtemos" in examples[0]["outputs"][0]
    assert visible("a\x1b[31m\u202eb\r\nc\td\r\ud800") == "a\\x1b[31m\\u202eb\nc\td\\r\\ud800"
    assert visible("\u200b\u2066\ufeff\u061c\u2028") == "\\u200b\\u2066\\ufeff\\u061c\\u2028"
    assert visible("a\xadb\u206a\u206f") == "a\\xadb\\u206a\\u206f"
    assert visible("\ufff9\ufffa\ufffb\ufffc") == "\\ufff9\\ufffa\\ufffb\ufffc"
    assert visible("\U000e0000\U000e0041\U000e007f") == "\\U000e0000\\U000e0041\\U000e007f"
    assert visible("é 語 👩\u200d💻") == "é 語 👩\u200d💻"


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    html, page = render(tmp_path, make_data())
    assert "http://" not in html
    assert "https://" not in html
    assert not {"link", "img", "iframe", "object", "embed"} & set(page.tags)
    addresses = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "data", "action")]
    assert all(value is not None and value.startswith("#") for value in addresses)
    assert "url(" not in re.sub(r"url\(#", "", html)


def test_the_policy_allows_only_the_pages_own_script(tmp_path: Path) -> None:
    html, _ = render(tmp_path, make_data(HOSTILE))
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}';" in html


def test_ids_are_unique(tmp_path: Path) -> None:
    _, page = render(tmp_path, make_data())
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for name, value in page.attributes if value and name in ("href", "xlink:href")}
    assert used <= set(ids)


def test_sections_without_data_are_omitted(tmp_path: Path) -> None:
    data = make_data(trainings={"a": pa.table({"other": [1]})}, quality=None, quality_notes=[], groups=None,
                     group_examples=None)  # fmt: skip
    _, page = render(tmp_path, data)
    assert page.tags.count("figure") == 1
    assert "There are no groups to measure." in page.text
    assert "Training" not in page.text


def test_labels_and_warnings_stay_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = quality_table(strategy(HOSTILE))
    html, page = render(tmp_path, make_data(quality=table, quality_notes=[HOSTILE]))
    _, harmless = render(tmp_path, make_data())
    assert page.tags == harmless.tags
    assert "<script>alert(1)</script>" not in html
    assert page.text.count("<script>alert(1)</script>") >= 5  # note, table, panels and captions of two charts
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", html)
    print_quality(table, ["[bold]not markup[/bold]"])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "[bold]not markup[/bold]" in shown


@pytest.mark.slow
def test_the_page_is_reproducible(tmp_path: Path) -> None:
    assert render(tmp_path, make_data())[0] == render(tmp_path, make_data())[0]
