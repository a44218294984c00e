"""What the project says of itself: one version, locked dependencies, hooks that need no network."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from installer import VERSION

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
GROUPS: dict[str, list[str]] = PROJECT["dependency-groups"]
LOCKS = {"dev": set(GROUPS) - {"matrix"}, "run": {"run"}, "demo": {"run", "lab"}, "matrix": {"matrix"}}


def locked(lock: str) -> dict[str, tuple[str, list[str]]]:
    """Each package of a lock file, with its version and the hashes of its files."""
    text = (REPOSITORY / "locks" / f"{lock}.txt").read_text()
    found = re.findall(r"^([\w.-]+)==(\S+)((?: \\\n {4}--hash=sha256:[0-9a-f]{64})+)$", text, re.M)
    entries = sum(not line.startswith(("#", " ")) for line in text.splitlines())
    assert len(found) == entries, "a line that is neither a comment nor NAME==VERSION with hashes"
    return {name: (version, hashes.split()[1::2]) for name, version, hashes in found}


def test_the_version_stands_in_one_place() -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "installer.VERSION"}
    # image/build.sh reads it with sed
    assert f'\nVERSION = "{VERSION}"' in (REPOSITORY / "installer" / "__init__.py").read_text()


def test_the_changelog_dates_this_version_below_what_is_unreleased() -> None:
    headings = re.findall(r"^## (.*)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(VERSION)} – \d{{4}}-\d\d-\d\d", headings[1])


@pytest.mark.parametrize("lock", LOCKS)
def test_what_is_asked_for_is_locked(lock: str) -> None:
    packages = locked(lock)
    for group in LOCKS[lock]:
        for text in GROUPS[group]:
            wanted = Requirement(text)
            name = canonicalize_name(wanted.name)
            assert name in packages, f"{text} is not in locks/{lock}.txt: run `make lock` and commit it"
            assert wanted.specifier.contains(packages[name][0]), f"{text}: run `make lock` and commit locks/"


@pytest.mark.parametrize("lock", ["run", "demo"])
def test_image_and_demo_have_what_is_tested(lock: str) -> None:
    tested = locked("dev")
    assert {name: tested[name] for name in locked(lock)} == locked(lock)


@pytest.mark.claim("installs only Python packages whose hashes are in `locks/run.txt`")
def test_the_image_takes_no_python_package_without_its_hash() -> None:
    installs = re.findall(r"pip install[^\n]*", (REPOSITORY / "Dockerfile").read_text())
    assert installs and all("--require-hashes" in each and "run.txt" in each for each in installs)


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_says_nothing_of_where_packages_come_from(lock: str) -> None:
    assert "://" not in (REPOSITORY / "locks" / f"{lock}.txt").read_text()


def test_hooks_run_what_is_in_the_venv() -> None:
    (repository,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].startswith(".venv/bin/"), hook["entry"]
