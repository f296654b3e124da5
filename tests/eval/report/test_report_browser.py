"""The report in a real browser: Debian's chromium (CHROMIUM names another), and axe-core where it is installed."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cpo_pipe.data.schemas import EXAMPLES, METRICS
from cpo_pipe.eval.judging import VERDICTS
from cpo_pipe.eval.metrics.differences import COMPARISONS
from cpo_pipe.eval.metrics.figures import VALUES
from cpo_pipe.eval.report.data import ReportData, StageRecord
from cpo_pipe.eval.report.leaderboard import leaderboards
from cpo_pipe.eval.report.report import write_report
from cpo_pipe.eval.report.verdict import verdict as verdict_of
from cpo_pipe.eval.statistics.agreement import AGREEMENT
from tests.support.report_data import HOSTILE, example, figure, make_data, said, verdict

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
AXE = Path(os.environ.get("AXE_CORE", "node_modules/axe-core")) / "axe.min.js"
COUNT = 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"),
]


def data_of(**changes: Any) -> ReportData:
    """60 examples: of three categories, the systems differing in a word, judged in every way there is."""
    examples = [
        {**example(number), "category": ("qa", "essay", "code")[number % 3], "target": f"the right answer is {number}"}
        for number in range(COUNT)
    ]
    outputs = [
        {"example_id": f"e{number}", "system": system, "decoding": decoding, "text": f"the {word} answer is {number}"}
        for number in range(COUNT)
        for decoding in ("greedy", "top-k")
        for system, word in {"mle": "wrong", "cpo": "right", "rival": "other"}.items()
    ]
    scores = '{"a": 0.5, "b": 0.25}'
    verdicts = [verdict(number, ("a", "b", "tie")[number % 3], said("ab", "a", scores)) for number in range(COUNT)]
    verdicts += [
        verdict(number, "tie", said("ab", "a"), said("ba", "b"), judge="api", system="rival", decoding="top-k")
        for number in range(7)
    ]
    difference = {"metric": "similarity win rate", "decoding": "greedy", "system_a": "cpo", "system_b": "mle",
                  "difference": 0.1, "ci_low": 0.0, "ci_high": 0.2, "p": 0.04, "p_holm": 0.08, "n": 60,
                  "n_needed": 700}  # fmt: skip
    found = make_data()
    metrics = pa.concat_tables([found.metrics, pa.Table.from_pylist(
        [figure(system, decoding, "chrF", value) for decoding in ("greedy", "top-k")
         for system, value in {"mle": 18.5, "cpo": 20.25, "rival": 9.0}.items()], schema=METRICS)])  # fmt: skip
    comparisons = pa.Table.from_pylist([difference], schema=COMPARISONS)
    ranked_by = ("similarity win rate", "greedy")
    scores = [
        {"example_id": f"e{number}", "system": system, "decoding": "greedy", "metric": "chrF", "value": value}
        for number in range(COUNT)
        for system, value in {"mle": 50.0, "cpo": 50.0 + (number * 7) % COUNT - 30, "rival": 1.0}.items()
    ]
    agreement = {"judge_a": "similarity", "judge_b": "api", "agreement": 0.8, "ci_low": 0.7, "ci_high": 0.9,
                 "kappa": 0.5, "kappa_low": 0.2, "kappa_high": 0.8, "n": 7, "decided": 0.9,
                 "n_decided": 5, "ties_a": 0.1, "ties_b": 0.2}  # fmt: skip
    return make_data(**{
        "agreements": pa.Table.from_pylist([agreement], schema=AGREEMENT),
        "metrics": metrics, "comparisons": comparisons, "scores": pa.Table.from_pylist(scores, schema=VALUES),
        "leaderboards": leaderboards(metrics, comparisons, "mle", ranked_by, {"MAUVE"}),
        "verdict": verdict_of(metrics, comparisons, "mle", *ranked_by), "ensembles": {"e": [(0.5, "cpo")]},
        "examples": pa.Table.from_pylist(examples, schema=EXAMPLES), "outputs": pa.Table.from_pylist(outputs),
        "verdicts": pa.Table.from_pylist(verdicts, schema=VERDICTS),
        "stages": [StageRecord(name="prepare", seconds=1, total_seconds=2, spent="")], **changes,
    })  # fmt: skip


def hostile() -> ReportData:
    huge = "x" * 100_000
    rows = [{**example(0, HOSTILE), "category": HOSTILE}, {**example(1), "category": "harmless", "target": huge}]
    outputs = [
        {"example_id": f"e{number}", "system": system, "decoding": "greedy", "text": text}
        for number, text in enumerate((HOSTILE, huge))
        for system in ("mle", "cpo")
    ]
    verdicts = [verdict(0, "a", said("ab", "a", '{"answer": "<img src=x onerror=alert(3)>"}'))]
    return data_of(
        examples=pa.Table.from_pylist(rows, schema=EXAMPLES),
        outputs=pa.Table.from_pylist(outputs),
        verdicts=pa.Table.from_pylist(verdicts, schema=VERDICTS),
    )


@dataclass
class Opened:
    """A page, and what it should not have done."""

    page: Any
    wrong: list[str] = field(default_factory=list)

    def found(self) -> str:
        text: str = self.page.inner_text("#found")
        return text

    def cards(self) -> list[str]:
        texts: list[str] = self.page.locator("#cards article h4").all_inner_texts()
        return texts

    def choose(self, name: str, value: str) -> None:
        self.page.select_option(f"select[name={name}]", value)

    def expect(self, found: str) -> None:
        playwright.expect(self.page.locator("#found")).to_have_text(re.compile(found))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    for name, data in {"plain": data_of(), "hostile": hostile()}.items():
        write_report(folder / f"{name}.html", data)
    return {name: folder / f"{name}.html" for name in ("plain", "hostile")}


@pytest.fixture
def visit(browser: Any, written: dict[str, Path]) -> Iterator[Callable[..., Opened]]:
    """Opens a report; no page may have complained, or asked for anything but itself."""
    visits: list[Opened] = []

    def opened(fragment: str = "", *, name: str = "plain", width: int = 1440, dark: bool = False) -> Opened:
        scheme = "dark" if dark else "light"
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        made = Opened(page)
        address = written[name].as_uri()
        visits.append(made)
        page.on("console", lambda message: made.wrong.append(message.text))
        page.on("pageerror", lambda error: made.wrong.append(str(error)))
        page.on("dialog", lambda dialog: (made.wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: made.wrong.append(request.url) if request.url != address else None)
        page.goto(address + fragment)
        page.wait_for_selector("#cards article")
        return made

    yield opened
    assert [one.wrong for one in visits] == [[]] * len(visits)
    for one in visits:
        one.page.close()


def test_a_page_of_all_examples_is_shown_with_outputs_and_verdicts(visit: Callable[..., Opened]) -> None:
    report = visit()
    assert report.found() == "60 of 60 examples · 1 to 25 shown"
    assert report.cards() == [f"Example {number} {('qa', 'essay', 'code')[number % 3 - 1]}" for number in range(1, 26)]
    card = report.page.locator("#cards article").first.inner_text()
    assert "the right answer is 0" in card
    assert "mle, greedy (baseline)" in card
    assert "similarity: ▲ wins against mle" in card
    assert "cpo: 0.5; mle: 0.25" in card
    assert "api: = ties against mle · ⇄ the orders disagree" in card
    assert "rival shown first → rival" in card
    assert "mle shown first → mle" in card


def test_searching_counts_and_changes_the_address(visit: Callable[..., Opened]) -> None:
    report = visit()
    report.page.fill("input[type=search]", "ANSWER IS 4")
    report.expect("^11 of 60 examples · 1 to 11 shown$")  # 4, 40 to 49
    assert report.page.url.endswith("#examples?search=ANSWER+IS+4")
    report.page.fill("input[type=search]", "nowhere")
    report.expect("^0 of 60 examples$")
    assert report.cards() == []
    assert report.page.locator("#found").get_attribute("role") == "status"


def test_examples_are_chosen_by_who_won_category_system_and_decoding(visit: Callable[..., Opened]) -> None:
    report = visit()
    report.choose("outcome", "wins")
    report.expect("^20 of 60")
    report.choose("category", "essay")
    report.expect("^0 of 60")
    report.choose("outcome", "loses")
    report.expect("^20 of 60")
    report.choose("category", "")
    report.choose("outcome", "flips")
    report.expect("^7 of 60")
    report.choose("judge", "similarity")
    report.expect("^0 of 60")
    report.choose("outcome", "")
    report.choose("system", "cpo")
    report.choose("decoding", "top-k")
    report.expect("^60 of 60")
    headings = report.page.locator("#cards article").first.locator("h5").all_inner_texts()
    assert headings == ["prompt", "target", "mle, top-k (baseline)", "cpo, top-k"]


def test_a_view_can_be_linked(visit: Callable[..., Opened]) -> None:
    first = visit()
    first.choose("category", "code")
    first.choose("outcome", "ties")
    first.choose("marked", "baseline")
    first.expect("^20 of 60")
    second = visit("#" + first.page.url.partition("#")[2])
    assert second.found() == first.found()
    assert second.cards() == first.cards()
    assert second.page.locator("select[name=marked]").input_value() == "baseline"
    second.page.evaluate("location.hash = '#examples?page=3&category=nonsense'")
    second.expect("^60 of 60 examples · 51 to 60 shown$")
    assert second.page.locator("select[name=outcome]").input_value() == ""


def test_pages_are_turned_with_the_keyboard_alone(visit: Callable[..., Opened]) -> None:
    report = visit()
    report.page.locator("#previous").focus()
    report.page.keyboard.press("Tab")
    report.page.keyboard.press("Enter")
    report.expect("26 to 50 shown")
    report.page.keyboard.press("Enter")
    report.page.keyboard.press("Enter")
    report.expect("51 to 60 shown")
    assert report.page.inner_text("#page") == "Page 3 of 3"
    assert report.page.locator("#next").get_attribute("aria-disabled") == "true"
    assert report.page.evaluate("document.activeElement.id") == "next", "the focus is not lost at the end"
    report.page.keyboard.press("Shift+Tab")
    report.page.keyboard.press("Space")
    report.expect("26 to 50 shown")


def test_every_control_is_reached_by_tab_and_enter_does_not_send_the_form(visit: Callable[..., Opened]) -> None:
    report = visit()
    report.page.locator("input[type=search]").focus()
    report.page.keyboard.type("answer is 59")
    report.page.keyboard.press("Enter")
    report.expect("^1 of 60")
    reached = []
    for _ in range(6):
        report.page.keyboard.press("Tab")
        reached.append(report.page.evaluate("document.activeElement.name"))
    assert reached == ["category", "system", "decoding", "judge", "outcome", "sort"]


def test_differences_are_marked_word_by_word(visit: Callable[..., Opened]) -> None:
    report = visit("#examples?search=e0&marked=baseline&decoding=greedy")
    marks = "#cards article >> nth=0 >> section:has(h5:text-is('cpo, greedy')) >> {}"
    assert report.page.locator(marks.format("del")).all_inner_texts() == ["wrong"]
    assert report.page.locator(marks.format("ins")).all_inner_texts() == ["right"]
    style = report.page.locator(marks.format("del")).evaluate("e => getComputedStyle(e).textDecorationLine")
    assert style == "line-through"
    report.choose("marked", "target")
    assert report.page.locator(marks.format("ins")).count() == 0
    assert report.page.locator("section:has(h5:text-is('mle, greedy (baseline)')) ins").first.inner_text() == "wrong"


def test_differences_are_a_longest_common_subsequence(visit: Callable[..., Opened]) -> None:
    differences = visit().page.evaluate
    assert differences("differences('a b c d', 'b x d e')") == [
        ["", ""], ["del", "a "], ["", "b "], ["del", "c "], ["ins", "x "], ["", "d "], ["ins", "e"], ["", ""],
    ]  # fmt: skip
    assert differences("differences('', 'one two')") == [["", ""], ["ins", "one two"], ["", ""]]
    assert differences("differences('same words', 'same words')") == [["", "same words"]]
    assert differences("differences('a '.repeat(2000), 'b '.repeat(2000))") is None, "too long to compare"
    assert differences("differences('a '.repeat(9000) + 'x', 'a '.repeat(9000) + 'y').at(-2)") == ["ins", "y"]


def test_the_answer_comes_first(visit: Callable[..., Opened]) -> None:
    report = visit()
    first = report.page.locator("main > *").first.inner_text()
    assert first.startswith(
        "cpo is better than mle\n\nsimilarity win rate of cpo under greedy 60% against 50%, +10 [+0, +20]"
    )
    assert report.page.locator("main h2").all_inner_texts() == [
        "cpo is better than mle", "Ranking", "Charts", "Training", "Examples", "Details"
    ]  # fmt: skip


def systems(report: Opened) -> list[str]:
    texts: list[str] = report.page.locator("[role=tabpanel]:not([hidden]) table.ranked tbody th").all_inner_texts()
    return [text.split()[0] for text in texts]


def test_columns_are_sorted_by_their_numbers(visit: Callable[..., Opened]) -> None:
    report = visit()
    assert systems(report) == ["cpo", "mle", "rival", "ground-truth"]
    chrf = report.page.locator("table.ranked >> nth=0 >> th button", has_text="chrF")
    chrf.click()
    assert systems(report) == ["cpo", "mle", "rival", "ground-truth"], "those without a value last"
    chrf.press("Enter")
    assert systems(report) == ["rival", "mle", "cpo", "ground-truth"]
    head = report.page.locator("table.ranked >> nth=0 >> th[aria-sort]")
    assert head.get_attribute("aria-sort") == "ascending"
    report.page.locator("table.ranked >> nth=0 >> th button", has_text="system").click()
    assert systems(report) == ["cpo", "ground-truth", "mle", "rival"]
    assert report.page.locator("th[aria-sort]").count() == 1


def test_tabs_are_opened_by_mouse_keyboard_and_address(visit: Callable[..., Opened]) -> None:
    report = visit()
    shown = report.page.locator("#details ~ div > [role=tabpanel]:not([hidden])")
    assert shown.get_attribute("id") == "metrics"
    report.page.get_by_role("tab", name="Negatives").click()
    assert shown.get_attribute("id") == "negatives"
    report.page.keyboard.press("ArrowLeft")
    assert shown.get_attribute("id") == "agreement"
    assert report.page.evaluate("document.activeElement.textContent") == "Judges"
    assert report.page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
    report.page.evaluate("location.hash = '#recipe'")
    playwright.expect(shown).to_have_attribute("id", "recipe")
    assert visit("#stages").page.locator("#stages").is_visible()


def test_examples_are_sorted_by_the_difference_of_their_scores(visit: Callable[..., Opened]) -> None:
    report = visit()
    report.choose("sort", "gain")
    gains = [(number * 7) % COUNT - 30 for number in range(COUNT)]
    best = sorted(range(COUNT), key=lambda number: -gains[number])
    report.expect("^60 of 60")
    assert [text.split()[1] for text in report.cards()] == [str(number + 1) for number in best[:25]]
    assert f"chrF: {50.0 + gains[best[0]]:.2f}" in report.page.locator("#cards article").first.inner_text()
    report.choose("sort", "loss")
    assert [text.split()[1] for text in report.cards()][:2] == [str(number + 1) for number in best[::-1][:2]]
    report.choose("system", "rival")
    report.choose("decoding", "top-k")
    report.expect("^0 of 60")  # no scores under this decoding
    assert report.page.url.endswith("#examples?system=rival&decoding=top-k&sort=loss")


def test_without_its_script_the_page_shows_all_panels(browser: Any, written: dict[str, Path]) -> None:
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(written["plain"].as_uri())
    assert page.locator(".panel").count() == page.locator(".panel:visible").count() > 5
    assert page.get_by_role("heading", name="Negatives", exact=True).is_visible()
    page.close()


def test_a_dark_page_is_dark(visit: Callable[..., Opened]) -> None:
    color = "getComputedStyle(document.body).backgroundColor"
    assert visit(dark=True).page.evaluate(color) == "rgb(22, 24, 27)"
    assert visit().page.evaluate(color) == "rgb(255, 255, 255)"


def test_hostile_texts_are_shown_as_they_are(visit: Callable[..., Opened]) -> None:
    report = visit("#examples?marked=baseline", name="hostile")
    page = report.page
    assert page.locator("article script, article img, option *").count() == 0
    card = page.locator("#cards article").first.inner_text()
    assert card.count("<script>alert(1)</script><img src=x onerror=alert(2)> & \"'> {{ 7 * 7 }} \\x1b[31m") == 5
    assert "answer: <img src=x onerror=alert(3)>" in card
    assert page.locator("select[name=category] option").count() == 3
    target = page.locator("#cards article >> nth=1 >> .target")
    assert len(target.inner_text()) < 2000
    assert target.get_by_role("button").inner_text() == "Show all 100,000 characters"
    target.get_by_role("button").press("Enter")
    assert target.inner_text().count("x") >= 100_000
    assert target.get_by_role("button").get_attribute("aria-expanded") == "true"
    page.fill("input[type=search]", "<SCRIPT>")
    report.expect("^1 of 2 examples")


@pytest.mark.parametrize("name", ["plain", "hostile"])
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_is_no_wider_than_the_screen(visit: Callable[..., Opened], width: int, name: str) -> None:
    report = visit("#examples?marked=target", name=name, width=width)
    assert report.page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.skipif(not AXE.is_file(), reason=f"{AXE} is not there (npm install axe-core; AXE_CORE names its folder)")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1440])
def test_axe_finds_nothing_serious(visit: Callable[..., Opened], width: int, dark: bool) -> None:
    report = visit("#examples?marked=baseline", width=width, dark=dark)
    report.page.evaluate(AXE.read_text(encoding="utf-8"))
    violations = report.page.evaluate("axe.run().then((found) => found.violations)")
    serious = [
        (found["id"], [node["html"] for node in found["nodes"]][:3])
        for found in violations
        if found["impact"] in ("serious", "critical")
    ]
    assert serious == []
