"""The machine's limit of inotify instances is raised while a cluster runs, and is then what it was before."""

from pathlib import Path

import pytest

from tests.cluster import inotify


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file in the place of the sysctl."""
    path = tmp_path / "max_user_instances"
    path.write_text("128\n")
    monkeypatch.setattr(inotify, "_SYSCTL", path)
    for name, at in (("_FOLDER", ""), ("_BEFORE", "before"), ("_HOLDERS", "clusters")):
        monkeypatch.setattr(inotify, name, tmp_path / "run" / at)
    return path


def test_the_last_cluster_puts_the_limit_back(limit: Path) -> None:
    inotify.raise_limit("a")
    inotify.raise_limit("b")
    inotify.lower_limit("a")
    assert limit.read_text() == "1024"
    inotify.lower_limit("b")
    assert limit.read_text() == "128\n"


def test_a_cluster_that_is_taken_down_twice_puts_back_nothing_that_is_newer(limit: Path) -> None:
    inotify.raise_limit("a")
    inotify.lower_limit("a")
    limit.write_text("200\n")
    inotify.lower_limit("a")
    assert limit.read_text() == "200\n"


def test_a_higher_limit_stays(limit: Path) -> None:
    limit.write_text("8192\n")
    inotify.raise_limit("a")
    assert limit.read_text() == "8192"
