"""The documentation: the site builds without a warning, and links are right there and on a forge."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
# read on a forge; the site has them as text
BESIDE = tuple(REPOSITORY / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))
NAMES = ("architecture", "security", "troubleshooting", "cli", "semantics", "differences", "operations", "metrics")


class _Links(HTMLParser):
    """What a page refers to, and what in it can be referred to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.to: set[str] = set()
        self.ids: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.to.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("site") / "site"
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(made)]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return made


def test_every_page_is_on_the_site(site: Path) -> None:
    built = {page.stem for page in site.glob("*.html")}
    assert built == {page.stem for page in PAGES} - {"README"} | {"index", "404"}
    assert built >= set(NAMES) | {"kernels", "acceleration"}


def test_links_on_the_site(site: Path) -> None:
    pages = {page: _Links(page) for page in site.glob("*.html") if page.name != "404.html"}
    missing = []
    for page, links in pages.items():
        for link in links.to:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if not target.exists() or (target in pages and parts.fragment and parts.fragment not in pages[target].ids):
                missing.append(f"{page.name}: {link}")
    assert missing == []


@pytest.mark.parametrize("page", PAGES + BESIDE, ids=lambda page: page.name)
def test_links_on_a_forge(page: Path) -> None:
    text = re.sub(r"^( {4}.*\n)+", "", page.read_text(), flags=re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        parts = urlsplit(link)
        assert not parts.scheme, f"{link}: documentation that needs a network"
        target = (page.parent / parts.path).resolve() if parts.path else page
        assert target.exists(), link
        if parts.fragment:
            assert parts.fragment in _anchors(target), link


@pytest.mark.parametrize("page", PAGES + BESIDE, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`((?:bpf|bench|cni|docs|image|installer|locks|manifests|tests)/[\w./-]*)`", page.read_text())
    assert [each for each in named if not (REPOSITORY / each).exists()] == []


def _anchors(page: Path) -> set[str]:
    """As forges make them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_drawings_stand_alone() -> None:
    """Well-formed, described for who can't see them, and with a ground of their own in light and dark."""
    for file in (REPOSITORY / "docs" / "images").glob("*.svg"):
        root = ElementTree.parse(file).getroot()
        of = "{http://www.w3.org/2000/svg}"
        assert root.find(f"{of}title") is not None
        assert root.find(f"{of}desc") is not None
        ground = root.find(f"{of}rect")
        assert ground is not None
        assert ground.get("fill", "").startswith("#")
        assert "href" not in file.read_text().replace("url(#", "")
