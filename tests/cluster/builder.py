"""`python -m tests.cluster.builder`: every program of a cluster, each built once into build/cluster/bin."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import click

from tests.cluster import versions
from tests.cluster.components import Component, components
from tests.lab.node import REPOSITORY

BUILD = REPOSITORY / "build" / "cluster"
BIN = BUILD / versions.folder()
# A build must leave the machine to those who use it, and the compiler takes as much memory as it is given processes.
_NICE, _PROCESSES = "19", 2
_USUAL_PLACE = Path("/usr/local/go/bin/go")


class BuildFailed(Exception):
    """One line, with the end of what the compiler said below it."""


def build_all(wanted: Iterable[Component], target: Path = BIN, say: Callable[[str], object] = print) -> None:
    """Build what is missing or was built from something else. Raises BuildFailed.

    A second builder waits for the first. One line is said of each component.
    """
    target.mkdir(parents=True, exist_ok=True)
    go, compiler = find_go(), compiler_version()
    with (target / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for component in wanted:
            began = time.monotonic()
            if is_built(component, target, compiler):
                say(f"{component.name} {component.version}: built before")
                continue
            build(component, target, go, compiler)
            say(f"{component.name} {component.version}: built in {time.monotonic() - began:.0f} s")


def compiler_version() -> str:
    """Go's. Raises BuildFailed."""
    return _output([find_go(), "env", "GOVERSION"])


def is_built(component: Component, target: Path, compiler: str) -> bool:
    """Whether the program is there, and of the key that it would be built with now."""
    key = _key_file(component, target)
    return (target / component.name).exists() and key.exists() and key.read_text() == component.key(compiler)


def build(component: Component, target: Path, go: str, compiler: str) -> None:
    """Build one; the program appears when it is complete. Raises BuildFailed."""
    fresh = target / f".{component.name}.new"
    how = [*component.command(), "-p", str(_PROCESSES), "-buildvcs=false", *component.flags()]
    done = subprocess.run(
        ["nice", "-n", _NICE, go, *how, "-o", fresh, component.package],
        cwd=component.directory(),
        env=os.environ | {"CGO_ENABLED": str(int(component.has_c))},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise BuildFailed(f"{component.package} {component.version} does not build:\n{done.stderr[-2000:]}")
    # in this order: of a builder that is stopped in between, nothing is left that looks built
    _key_file(component, target).unlink(missing_ok=True)
    fresh.rename(target / component.name)
    _key_file(component, target).write_text(component.key(compiler))


def module_directory(component: Component) -> Path:
    """Where the source of the component's module is, with its charts and templates; downloaded if it is not there."""
    go = find_go()
    subprocess.run([go, "mod", "download", component.module], cwd=component.folder, check=True, capture_output=True)
    return Path(_output([go, "list", "-m", "-f", "{{.Dir}}", component.module], component.folder))


def find_go() -> str:
    """The go command. Raises BuildFailed if there is none."""
    found = shutil.which("go") or (str(_USUAL_PLACE) if _USUAL_PLACE.exists() else None)
    if not found:
        raise BuildFailed(f"go is neither on PATH nor in {_USUAL_PLACE.parent}; a cluster is built with Go 1.26")
    return found


def _key_file(component: Component, target: Path) -> Path:
    return target / f".{component.name}.key"


def _output(argv: list[str], folder: Path | None = None) -> str:
    return subprocess.run(argv, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@click.command()
@click.argument("names", nargs=-1)
def builder(names: tuple[str, ...]) -> None:
    """Build the programs of a cluster, or those that are named."""
    known = {each.name: each for each in components()}
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name} is none of {', '.join(known)}")
    try:
        build_all([known[name] for name in names or known], say=lambda line: click.echo(f"cluster: {line}"))
    except BuildFailed as error:
        sys.exit(f"cluster: {error}")


if __name__ == "__main__":
    builder()
