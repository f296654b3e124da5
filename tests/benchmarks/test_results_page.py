"""The parts of docs/results.md."""

from pathlib import Path

from tests.support.results_page import write_part


def test_a_part_is_written_and_the_others_stay(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    write_part(page, "tiny model", "# Tiny\n\n1\n")
    assert page.read_text() == "<!-- part: tiny model -->\n# Tiny\n\n1\n"
    write_part(page, "real model: text", "# Real\n")
    write_part(page, "tiny model", "# Tiny\n\n2\n")
    assert page.read_text() == "<!-- part: real model: text -->\n# Real\n\n<!-- part: tiny model -->\n# Tiny\n\n2\n"


def test_the_projects_page_has_parts() -> None:
    """Else the next part would be written over what is there."""
    assert (Path(__file__).parents[2] / "docs/results.md").read_text().startswith("<!-- part: ")
