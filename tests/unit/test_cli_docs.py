"""docs/cli.md says what --help says, for every command, and which exit statuses there are."""

from docs.commands import PAGE, page
from installer.commands import ending
from installer.commands.cli import COMMANDS


def test_the_documentation_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run `make docs` and commit docs/cli.md"


def test_every_command_is_told() -> None:
    titles = [line.removeprefix("### ") for line in PAGE.read_text().splitlines() if line.startswith("### ")]
    assert titles == sorted(COMMANDS)


def test_every_exit_status_is_told() -> None:
    told = PAGE.read_text().partition("## Exit status")[2].partition("##")[0]
    for status in (ending.GOOD, ending.FAILED, ending.USAGE, ending.INTERRUPTED, ending.READER_GONE):
        assert f"- `{status}`: " in told
