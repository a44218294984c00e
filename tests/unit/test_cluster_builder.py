"""When a program of the cluster is built again, and when it is not."""

import re
import shutil
from pathlib import Path

import pytest

from tests.cluster.builder import BuildFailed, build_all, is_built
from tests.cluster.components import MODULES, Component, components
from tests.cluster.variables import UnknownValue

GO = """#!/bin/sh
# as much of a compiler as the builder can notice: the program is who it was built from
case $1 in
env) echo "go$GO_TEST_VERSION" ;;
build)
    while [ "$1" != -o ]; do shift; done
    [ "$3" != sidestep.test/broken ] || { echo 'syntax error' >&2; exit 1; }
    echo "$3" >> "$GO_TEST_LOG"
    echo "$3" > "$2" ;;
esac
"""


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Which packages have been compiled, a line each; the compiler is a script."""
    go, log = tmp_path / "path" / "go", tmp_path / "log"
    go.parent.mkdir()
    go.write_text(GO)
    go.chmod(0o755)
    log.touch()
    monkeypatch.setenv("PATH", str(go.parent), prepend=":")
    monkeypatch.setenv("GO_TEST_LOG", str(log))
    monkeypatch.setenv("GO_TEST_VERSION", "1.26")
    return log


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A module that pins one thing."""
    folder = tmp_path / "module"
    folder.mkdir()
    (folder / "go.mod").write_text("module sidestep.test/cluster\n\nrequire sidestep.test/thing v1.2.3\n")
    (folder / "go.sum").write_text("sidestep.test/thing v1.2.3 h1:abc=\n")
    return folder


def thing(folder: Path, tags: str = "", package: str = "sidestep.test/thing") -> Component:
    return Component("thing", package, folder, "sidestep.test/thing", tags)


def test_a_program_is_built_once(built: Path, folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    build_all([thing(folder)], tmp_path / "bin", said.append)
    build_all([thing(folder)], tmp_path / "bin", said.append)
    assert built.read_text() == "sidestep.test/thing\n"
    assert (tmp_path / "bin" / "thing").read_text() == "sidestep.test/thing\n"
    assert said == ["thing v1.2.3: built in 0 s", "thing v1.2.3: built before"]


@pytest.mark.parametrize("name", ["go.mod", "go.sum"])
def test_a_program_is_built_again_when_what_it_is_built_from_has_changed(
    built: Path, folder: Path, tmp_path: Path, name: str
) -> None:
    build_all([thing(folder)], tmp_path / "bin", str)
    with (folder / name).open("a") as file:
        file.write("// changed\n")
    build_all([thing(folder)], tmp_path / "bin", str)
    assert len(built.read_text().splitlines()) == 2


def test_a_program_is_built_again_with_other_flags_and_by_another_compiler(
    built: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_all([thing(folder)], tmp_path / "bin", str)
    build_all([thing(folder, tags="other")], tmp_path / "bin", str)
    monkeypatch.setenv("GO_TEST_VERSION", "1.27")
    build_all([thing(folder, tags="other")], tmp_path / "bin", str)
    assert len(built.read_text().splitlines()) == 3


def test_a_program_that_was_deleted_is_built_again(built: Path, folder: Path, tmp_path: Path) -> None:
    build_all([thing(folder)], tmp_path / "bin", str)
    (tmp_path / "bin" / "thing").unlink()
    build_all([thing(folder)], tmp_path / "bin", str)
    assert len(built.read_text().splitlines()) == 2


def test_a_build_that_fails_says_what_and_why_and_leaves_nothing_that_looks_built(
    built: Path, folder: Path, tmp_path: Path
) -> None:
    broken = thing(folder, package="sidestep.test/broken")
    with pytest.raises(BuildFailed, match=r"(?s)sidestep.test/broken v1\.2\.3 does not build:.*syntax error"):
        build_all([broken], tmp_path / "bin", str)
    assert not is_built(broken, tmp_path / "bin", "go1.26")
    assert not (tmp_path / "bin" / "thing").exists()


@pytest.mark.parametrize("folder", sorted(MODULES.iterdir()), ids=lambda folder: str(folder.name))
def test_each_module_pins_the_programs_that_are_built_from_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here: list[Component] = []
    for kubernetes, containerd, network in (
        ("1.36", "distribution", "bridge"),
        ("1.37", "2.4", "flannel"),
        ("1.36", "distribution", "cilium"),
    ):
        monkeypatch.setenv("KUBERNETES", kubernetes)
        monkeypatch.setenv("CONTAINERD", containerd)
        monkeypatch.setenv("NETWORK", network)
        here = here or [each for each in components() if each.folder == folder]
    (tools,) = re.findall(r"^tool \((.*?)^\)|^tool (.*?)$", (folder / "go.mod").read_text(), re.MULTILINE | re.DOTALL)
    assert sorted("".join(tools).split()) == sorted(each.package for each in here)
    assert all(f"{each.module} {each.version} h1:" in (folder / "go.sum").read_text() for each in here)


@pytest.mark.parametrize(("variable", "known"), [("KUBERNETES", "1.36, 1.37"), ("CONTAINERD", "distribution, 2.4")])
def test_a_release_that_nobody_pins_is_one_line(variable: str, known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "0.9")
    with pytest.raises(UnknownValue, match=f"^{variable}=0.9 is none of {known}$"):
        components()


def test_what_pins_the_programs_says_nothing_of_where_modules_come_from(tmp_path: Path) -> None:
    copy = shutil.copytree(MODULES, tmp_path / "modules")
    assert {path.name for path in copy.glob("*/*")} == {"go.mod", "go.sum"}
    # not "h1://", with which a checksum may begin
    assert not [path for path in copy.glob("*/*") if re.search("[a-z]://", path.read_text())]
