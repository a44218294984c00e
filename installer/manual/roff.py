"""Pages for man(1): the man macros, groff_man(7)."""

import re
from collections.abc import Iterable, Iterator

from installer import VERSION
from installer.manual.page import ENVIRONMENT, EXIT, FILES, Page

_SPECIAL = {"\\": r"\e", "-": r"\-", "^": r"\(ha", "~": r"\(ti", "'": r"\(aq", "`": r"\(ga"}


def page_of(page: Page, others: Iterable[Page], date: str) -> str:
    """The source of a page; `others` are those it refers to, `date` is YYYY-MM-DD."""
    return "\n".join(_lines(page, others, date)) + "\n"


def _lines(page: Page, others: Iterable[Page], date: str) -> Iterator[str]:
    yield f'.TH {page.name.upper()} 1 {date} "sidestep {VERSION}" "User Commands"'
    yield from (".SH NAME", f"{page.name} \\- {_text(page.brief)}")
    yield from (".SH SYNOPSIS", f".B {_plain(page.command)}", _text(page.usage))
    yield ".SH DESCRIPTION"
    for number, each in enumerate(page.paragraphs):
        if number:
            yield ".PP"
        if each.verbatim:
            yield from (".nf", *map(_text, each.text.splitlines()), ".fi")
        else:
            yield _text(each.text)
    yield from _terms("OPTIONS", page.options)
    yield from _terms("COMMANDS", ((f"{page.name}-{name}(1)", text) for name, text in page.commands))
    yield from _terms("EXIT STATUS", EXIT)
    if page.commands:
        yield from _terms("ENVIRONMENT", ENVIRONMENT)
        yield from _terms("FILES", FILES)
    yield from (".SH SEE ALSO", ",\n".join(f".BR {_plain(each.name)} (1)" for each in others).replace(",\n", " ,\n"))


def _terms(title: str, terms: Iterable[tuple[str, str]]) -> Iterator[str]:
    for number, (term, text) in enumerate(terms):
        if not number:
            yield f".SH {title}"
        yield from (".TP", f"\\fB{_plain(term)}\\fR", _text(text))


def _text(text: str) -> str:
    """Running text: `code` becomes bold, and no line is taken for a request."""
    parts = re.split(r"`([^`]+)`", text)
    line = "".join(f"\\fB{_plain(part)}\\fR" if odd % 2 else _plain(part) for odd, part in enumerate(parts))
    return f"\\&{line}" if line.startswith((".", "\\(aq")) else line


def _plain(text: str) -> str:
    return "".join(_SPECIAL.get(each, each) for each in text)
