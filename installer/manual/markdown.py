"""docs/cli.md: the same for the site."""

from collections.abc import Iterable, Iterator

from installer.manual.page import ENVIRONMENT, EXIT, FILES, Page, pages

_HEAD = """\
# The command line

Made of what `--help` shows, by `make docs`; the same as pages for man(1): `make man`, then
`man -l build/man/sidestep.1`. Where their tables lead to is in [troubleshooting.md](troubleshooting.md).

- Every command works as root on the node, or in the agent's container:
  `kubectl exec -n istio-system PODNAME -- sidestep status`. `completion`, `--help` and `--version` need nobody special.
- Looking is reading the pinned maps: it works while the agent is down, and changes nothing. `trace` asks the programs
  to tell what they do as long as it runs, and loads one of its own; `explain --try` makes a connection, `deny --kill`
  ends some.
- `--output json` and `yaml` print the same document for programs, `trace` one for each event. Three commands have no
  `--output`: `agent` logs, `top` draws, `completion` prints a script.
- An error is one line on standard error that says what to do next. Nothing ends in a traceback: an unforeseen error
  leaves a file for the bug report and names it.
- In a shell: `eval "$(sidestep completion bash)"` (or `zsh`; fish: `sidestep completion fish | source`).
"""


def document() -> str:
    """All of docs/cli.md."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield _HEAD
    for title, terms in (("Exit status", EXIT), ("Environment", ENVIRONMENT), ("Files", FILES)):
        yield from (f"## {title}", "", *_terms(terms), "")
    for page in pages():
        yield from _section(page)


def _section(page: Page) -> Iterator[str]:
    yield from (f"## {page.command}", "", f"    {page.command} {page.usage}", "")
    for each in page.paragraphs:
        lines = (f"    {line}" for line in each.text.splitlines()) if each.verbatim else (each.text,)
        yield from (*lines, "")
    if page.options:
        yield from (*_terms(page.options), "")
    if page.commands:
        yield from ("Commands:", "")
        yield from (*(f"- [{name}](#{'-'.join((*page.words, name))}): {text}" for name, text in page.commands), "")


def _terms(terms: Iterable[tuple[str, str]]) -> Iterator[str]:
    for term, text in terms:
        yield f"- `{term}`: {text}"
