"""`sidestep kubectl-plugin`: prints the plugin for kubectl, one file with its libraries in it."""

import io
import sys
import zipapp
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from installer.commands.command import Command

_LIBRARIES = ("click", "rich")
_PACKAGE = "installer.kubectl"
_MAIN = """import sys
if sys.version_info < (3, 11):
    sys.exit("kubectl sidestep needs Python 3.11 or newer; this is " + sys.version.split()[0])
from installer.kubectl.cli import main
main()
"""


@click.command("kubectl-plugin", cls=Command)
def kubectl_plugin() -> None:
    """Print the plugin that makes `kubectl sidestep` a command, a file to put on the PATH.

    \b
        kubectl exec -n istio-system daemonset/istio-cni-node -- sidestep kubectl-plugin > kubectl-sidestep
        chmod +x kubectl-sidestep && mv kubectl-sidestep /usr/local/bin/

    It needs Python 3.11 and kubectl on that machine, and nothing else.
    """  # noqa: D301 (after \b, click keeps a paragraph's line breaks)
    if sys.stdout.isatty():
        raise click.UsageError("this prints a program; send it to a file: sidestep kubectl-plugin > kubectl-sidestep")
    sys.stdout.buffer.write(plugin())


def plugin() -> bytes:
    """The file's content: a script that Python runs, made of a zip archive."""
    with TemporaryDirectory() as folder:
        for place, content in _files():
            target = Path(folder, place)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        made = io.BytesIO()
        zipapp.create_archive(folder, made, interpreter="/usr/bin/env python3", compressed=True)
        return made.getvalue()


def _files() -> Iterator[tuple[str, bytes]]:
    """Place in the archive, and content."""
    yield "__main__.py", _MAIN.encode()
    yield "installer/__init__.py", _source("installer").read_bytes()
    for package in (_PACKAGE, *_LIBRARIES):
        root = _source(package).parent
        for file in sorted(root.rglob("*.py")):
            yield f"{package.replace('.', '/')}/{file.relative_to(root)}", file.read_bytes()


def _source(package: str) -> Path:
    found = find_spec(package)
    assert found and found.origin, package
    return Path(found.origin)
