"""One date for each tokenizer whose chat template prints one, whatever day it is."""

import json
import shutil
from collections.abc import Callable
from datetime import datetime, tzinfo
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cpo_pipe.data.fingerprint import tokenizer_fingerprint
from cpo_pipe.data.models.chat import ChatTemplate, Conversation
from cpo_pipe.data.models.chat_date import FILE, KIND, chat_date
from cpo_pipe.data.models.templates import encode_prompts_again
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.prepare.pairs import Pairs
from cpo_pipe.pipeline.prepare.prepare import find_examples, prepare
from tests.support.models import make_tokenizer
from tests.support.pairs import pairs, write_jsonl

TURNS = "{% for m in messages %} {{ m.content }}:{% endfor %}"
DATED = f"[{{{{ strftime_now('%d %b %Y, %A') }}}}]{TURNS}"
ELSEWHERE = f"{{% if tools %}}{{{{ strftime_now('%Y') }}}}{{% endif %}}{TURNS}"

SetDay = Callable[[str], None]


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> SetDay:
    """Sets the date that all clocks show."""

    def set_day(text: str) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> "Clock":
                return cls.fromisoformat(f"{text}T12:00:00").replace(tzinfo=tz)

        monkeypatch.setattr("cpo_pipe.data.models.chat_date.datetime", Clock)
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)

    return set_day


def tokenizer(folder: Path, template: str | None) -> TokenizerFiles:
    folder.mkdir()
    make_tokenizer(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.chat_template = template
    loaded.save_pretrained(folder)
    return TokenizerFiles(folder, tokenizer_fingerprint(folder, Store(folder.parent / "hashes").hash_file))


def test_the_day_of_the_first_use_stays(tmp_path: Path, day: SetDay) -> None:
    one, other = tokenizer(tmp_path / "one", DATED), tokenizer(tmp_path / "other", f"{DATED} ")
    store = Store(tmp_path / "store")
    day("2026-11-29")
    assert chat_date(one, store) == "2026-11-29"
    day("2026-11-30")
    assert chat_date(one, Store(tmp_path / "store")) == "2026-11-29"
    assert chat_date(other, store) == "2026-11-30"
    assert chat_date(one, Store(tmp_path / "another")) == "2026-11-30"
    moved = TokenizerFiles(Path(shutil.move(one.path, tmp_path / "moved")), one.fingerprint)
    assert chat_date(moved, store) == "2026-11-29"


@pytest.mark.parametrize("template", [None, TURNS])
def test_what_prints_no_date_has_none(tmp_path: Path, template: str | None) -> None:
    store = Store(tmp_path / "store")
    assert chat_date(tokenizer(tmp_path / "t", template), store) is None
    assert not (store.local / KIND).exists(), "what is not asked is not recorded"


def test_a_date_that_is_printed_with_tools_only_stays_too(tmp_path: Path, day: SetDay) -> None:
    files, store = tokenizer(tmp_path / "t", ELSEWHERE), Store(tmp_path / "store")
    day("2026-11-29")
    assert chat_date(files, store) == "2026-11-29"
    day("2027-01-01")
    chat = ChatTemplate(files.load(), chat_date(files, store))
    assert chat.prompt(Conversation.of_text("hi")) == " hi:"
    assert chat.prompt(Conversation([{"role": "user", "content": "hi"}], [{"type": "function"}])) == "2026 hi:"


def test_a_store_that_recorded_no_date_keeps_none(tmp_path: Path) -> None:
    files, store = tokenizer(tmp_path / "t", ELSEWHERE), Store(tmp_path / "store")
    store.artifact(KIND, {"tokenizer": files.fingerprint}).make(lambda writer: (writer.path / FILE).write_text(""))
    assert chat_date(files, store) is None


def test_a_template_that_prints_only_the_time_has_a_date(tmp_path: Path) -> None:
    assert chat_date(tokenizer(tmp_path / "t", "{{ strftime_now('%H:%M') }}"), Store(tmp_path / "store"))


def test_a_template_in_the_old_file_is_seen(tmp_path: Path, day: SetDay) -> None:
    files = tokenizer(tmp_path / "t", None)
    config = json.loads((files.path / "tokenizer_config.json").read_text())
    (files.path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": DATED}))
    day("2026-11-29")
    assert chat_date(files, Store(tmp_path / "store")) == "2026-11-29"


def test_a_prompt_is_rendered_with_the_date_it_is_given(tmp_path: Path) -> None:
    loaded = tokenizer(tmp_path / "t", DATED).load()
    text = "[02 Jan 2020, Thursday] hi:"
    asked = Conversation.of_text("hi")
    assert ChatTemplate(loaded, "2020-01-02").prompt(asked) == text
    assert encode_prompts_again("chat", [asked], ["no"], loaded, "2020-01-02") == [loaded.encode(text)]


def test_examples_of_a_later_day_have_the_date_of_the_first(tmp_path: Path, day: SetDay) -> None:
    folder = tokenizer(tmp_path / "t", DATED).path
    store = Store(tmp_path / "store")

    def config(rows: int) -> Pairs:
        source = str(write_jsonl(tmp_path / f"{rows}.jsonl", pairs(rows)))
        return Pairs(source=source, tokenizer=str(folder), template="chat", train=rows)

    day("2026-11-29")
    first = prepare(config(3), store)
    assert first.rendering["chat_date"] == first.artifact.spec["rendering"]["chat_date"] == "2026-11-29"
    day("2027-01-01")
    found = find_examples(config(3), store)
    assert found is not None
    assert found.artifact.path == first.artifact.path, "nothing is made again"
    grown = prepare(config(5), store)
    assert grown.rendering == first.rendering, "so negatives and groups are those of the first day"
    rendered = grown.read("train")["rendered"].to_pylist()
    assert set(first.read("train")["rendered"].to_pylist()) < set(rendered)
    assert all(text.startswith("[29 Nov 2026, Sunday] say ") for text in rendered)
    elsewhere = prepare(config(3), Store(tmp_path / "another"))
    assert elsewhere.rendering["chat_date"] == "2027-01-01"


@pytest.mark.parametrize(
    ("chat_template", "template", "dated"),
    [(TURNS, "chat", False), (ELSEWHERE, "plain", False), (ELSEWHERE, "chat", True)],
)
def test_without_a_date_the_spec_has_none(tmp_path: Path, chat_template: str, template: str, dated: bool) -> None:
    folder = tokenizer(tmp_path / "t", chat_template).path
    source = str(write_jsonl(tmp_path / "a.jsonl", pairs(3)))
    config = Pairs(source=source, tokenizer=str(folder), template=template, train=3)
    assert ("chat_date" in prepare(config, Store(tmp_path / "store")).rendering) == dated
