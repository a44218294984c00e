"""python -m docs.commands: brings the part of cli.md that says what --help shows up to date. `make docs` does so."""

from copy import copy
from pathlib import Path

from mkdocs_click._docs import make_command_docs

from installer.commands.cli import NAME, cli

PAGE = Path(__file__).with_name("cli.md")
_MARK = "<!-- From here on it is what `--help` shows: `make docs` writes it. -->\n"
_COLUMNS = 100  # of the options


def page() -> str:
    """All of cli.md: what is written by hand, then every command."""
    described = copy(cli)
    described.context_settings = {**cli.context_settings, "terminal_width": _COLUMNS}
    by_hand, mark, _ = PAGE.read_text().partition(_MARK)
    return "\n".join([by_hand + mark, *make_command_docs(NAME, described, depth=1, list_subcommands=True)])


if __name__ == "__main__":
    PAGE.write_text(page())
