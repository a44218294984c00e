"""The manual says what --help says, for every command, and formatters have nothing to complain about."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from installer.commands.cli import COMMANDS
from installer.commands.ending import STATUSES
from installer.manual.markdown import document
from installer.manual.page import pages

REPOSITORY = Path(__file__).parents[2]
LIMIT = 120


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("manual") / "man"
    argv = [sys.executable, "-m", "installer.manual", "man", str(made)]
    subprocess.run(argv, cwd=REPOSITORY, check=True, timeout=LIMIT)
    return made


def help_of(*words: str) -> str:
    argv = [str(REPOSITORY / "sidestep"), *words, "--help"]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=LIMIT).stdout


def test_the_documentation_is_up_to_date() -> None:
    assert (REPOSITORY / "docs" / "cli.md").read_text() == document(), "run `make docs` and commit docs/cli.md"


def test_there_is_a_page_for_every_command(manual: Path) -> None:
    assert {each.name for each in manual.iterdir()} >= {f"sidestep-{name}.1" for name in COMMANDS} | {"sidestep.1"}


def test_pages_say_what_help_says() -> None:
    for page in pages():
        shown = "".join(help_of(*page.words[1:]).split())
        for flags, text in page.options:
            assert "".join(flags.split()) in shown, page.command
            assert "".join(text.split()) in shown, page.command
        for each in page.paragraphs:
            assert "".join(each.text.split()) in shown, page.command


def test_formatters_do_not_complain(manual: Path) -> None:
    every = sorted(manual.iterdir())
    lint = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", *map(str, every)], capture_output=True, text=True)
    assert (lint.returncode, lint.stdout, lint.stderr) == (0, "", "")
    for page in every:
        argv = ["groff", "-man", "-ww", "-K", "utf8", "-T", "utf8", "-P", "-c", str(page)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT)
        assert (done.returncode, done.stderr) == (0, "")
        assert page.stem in done.stdout


def test_the_page_tells_the_exit_statuses(manual: Path) -> None:
    argv = ["mandoc", "-T", "utf8", "-O", "width=400", str(manual / "sidestep.1")]
    shown = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=LIMIT).stdout
    shown = re.sub(".\b", "", shown)  # bold is struck twice
    section = shown.partition("EXIT STATUS")[2].partition("ENVIRONMENT")[0].split()
    for status, _ in STATUSES:
        assert str(status) in section
