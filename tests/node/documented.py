"""The command lines of README.md and docs/: found in the pages' text, with a lab's names put in."""

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.lab.node import REPOSITORY

PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
# a line of an indented block, after a prompt if there is one, or words in backticks
_IN_BLOCK = re.compile(r"^ {4,}(?:\$ )?((?:kubectl exec .*? -- )?(?:kubectl )?sidestep [a-z].*)$")
_IN_TEXT = re.compile(r"`((?:kubectl exec [^`]*? -- )?(?:kubectl )?sidestep [a-z][^`]*)`")
_EXEC = re.compile(r"^kubectl exec .*? -- ")
# an explanation beside a command in a block: after a hash, or after three spaces
_BESIDE = re.compile(r"\s+#\s.*$|\s{3,}.*$")
_OTHERS = ("|", ">", "<")  # what follows is the shell's


class Documented(NamedTuple):
    """A command line as the pages have it: its words after `sidestep`, and the page that is first to have it."""

    program: str  # sidestep or kubectl sidestep
    words: tuple[str, ...]
    page: str

    def __str__(self) -> str:
        return f"{self.program} {shlex.join(self.words)}"


def documented() -> list[Documented]:
    """Each command line once, in the pages' order."""
    found: dict[tuple[str, tuple[str, ...]], Documented] = {}
    for page in PAGES:
        for text in _lines(page):
            program, words = _parsed(text)
            found.setdefault((program, words), Documented(program, words, page.name))
    return list(found.values())


def _lines(page: Path) -> Iterator[str]:
    for line in page.read_text().splitlines():
        if block := _IN_BLOCK.match(line):
            yield block[1]
        else:
            yield from _IN_TEXT.findall(line)


def _parsed(text: str) -> tuple[str, tuple[str, ...]]:
    """The program, and its words up to what the shell does with its output."""
    text = _BESIDE.sub("", _EXEC.sub("", text))
    program = "kubectl sidestep" if text.startswith("kubectl ") else "sidestep"
    words = shlex.split(text.removeprefix(program))
    end = next((number for number, word in enumerate(words) if word.startswith(_OTHERS)), len(words))
    return program, tuple(word for word in words[:end] if word != "…")


def with_names(words: tuple[str, ...], names: Mapping[str, str]) -> list[str]:
    """The words with the lab's names for those of the pages, of which longer ones go first."""
    ordered = sorted(names, key=len, reverse=True)
    pattern = re.compile("|".join(rf"(?<![\w-]){re.escape(name)}(?![\w-])" for name in ordered))
    return [pattern.sub(lambda match: names[match[0]], word) for word in words]
