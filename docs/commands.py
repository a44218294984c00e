"""`python -m docs.commands` brings cli.md's copy of the --help texts up to date. `make docs` runs it."""

from copy import copy
from pathlib import Path

from mkdocs_click._docs import make_command_docs

from installer.commands.cli import NAME, cli

PAGE = Path(__file__).with_name("cli.md")
_MARK = "<!-- Everything below is what `--help` shows. `make docs` writes it. -->\n"
_COLUMNS = 100  # width of the options' list


def page() -> str:
    """All of cli.md: the part written by hand, then the --help of every command."""
    described = copy(cli)
    described.context_settings = {**cli.context_settings, "terminal_width": _COLUMNS}
    by_hand, mark, _ = PAGE.read_text().partition(_MARK)
    return "\n".join([by_hand + mark, *make_command_docs(NAME, described, depth=1, list_subcommands=True)])


if __name__ == "__main__":
    PAGE.write_text(page())
