"""What the pages show is what happens: their Python sessions run, and their links into the code point at it."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/README.md"))]
SESSION = re.compile(r"^```python\n(>>> .*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def test_links_into_the_code_are_current():
    done = subprocess.run([sys.executable, ROOT / "docs" / "build.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_link_to_what_is_there(page):
    links = LINK.findall(page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_the_tour_prints_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    text = "\n".join(SESSION.findall(page))
    session = doctest.DocTestParser().get_doctest(text, {}, "tour.md", "docs/tour.md", 0)
    assert len(session.examples) > 50
    printed: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(session, out=printed.append)
    assert results.failed == 0, "".join(printed)
