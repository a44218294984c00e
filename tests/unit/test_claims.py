"""What the security model rules out is shown by tests: those quote its sentences, and no quotation is out of date."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SECURITY = REPOSITORY / "docs" / "security.md"
PAGES = (SECURITY, REPOSITORY / "README.md", REPOSITORY / "docs" / "differences.md")
RULES_OUT = re.compile(r"\b(cannot|can't|never|only|nobody|nothing|must|refuses?|refused)\b", re.IGNORECASE)
# sections and lists of which every row or item counts
ALL_OF = ("What fails how", "It cannot:")
# about this page itself
NO_CLAIMS = ("Tests quote the sentences", "A test checks", '"Closed" means', "It cannot:")


def claims() -> Iterator[tuple[str, str]]:
    """Each quotation in a `pytest.mark.claim`, with the test that shows it."""
    for path in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for mark in node.decorator_list:
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.claim":
                        for quoted in mark.args:
                            yield ast.literal_eval(quoted), f"{path.relative_to(REPOSITORY)}::{node.name}"


def text_of(page: Path) -> str:
    return " ".join(page.read_text().split())


def statements(page: Path) -> Iterator[tuple[str, str]]:
    """The page's table rows, list items and sentences, each with what is above it: its list's first line or section."""
    section = above = ""
    for block in re.split(r"\n\n+", page.read_text()):
        if block.startswith("#"):
            section = above = block.lstrip("# ")
        elif block.startswith("|"):
            yield from ((section, row) for row in block.splitlines()[2:])
        elif block.startswith("- "):
            yield from ((above, " ".join(item.split())) for item in re.split(r"\n- ", block[2:]))
        elif not block.startswith("    "):
            above = " ".join(block.split())
            yield from ((section, sentence) for sentence in re.split(r"(?<=[.:])\s+(?=[A-Z*])", above))


def test_what_the_security_model_rules_out_is_quoted_by_a_test() -> None:
    shown = [quoted for quoted, _ in claims()]
    bare = [
        statement
        for above, statement in statements(SECURITY)
        if (above.startswith(ALL_OF) or RULES_OUT.search(statement))
        and not statement.startswith(NO_CLAIMS)
        and not any(quoted in statement for quoted in shown)
    ]
    assert not bare, "\n".join(["no test has a mark `claim` with words of these:", *bare])


def test_no_quotation_is_out_of_date() -> None:
    pages = [text_of(page) for page in PAGES]
    stale = [f"{test}: {quoted}" for quoted, test in claims() if not any(quoted in page for page in pages)]
    assert not stale, "\n".join(["these words are on no page; does the test still show what the page says?", *stale])
