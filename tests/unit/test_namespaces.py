"""Looking for namespaces in a procfs where things are missing, or not what they seem."""

import resource
from pathlib import Path

import pytest

from cni.netns.namespaces import NoProcfs, find_netns
from tests.lab.namespaces import open_netns


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """As little of a procfs as there can be: files where namespaces would be."""
    for process in ("self", "1", "42"):
        namespaces = tmp_path / process / "ns"
        namespaces.mkdir(parents=True)
        (namespaces / "net").touch()
        (namespaces / "mnt").touch()
        (tmp_path / process / "mountinfo").touch()
    return tmp_path


def found(proc: Path) -> list[int]:
    with find_netns({1, 2}, proc=proc) as namespaces:
        return [cookie for cookie, _ in namespaces]


def test_processes_that_vanish_and_files_that_are_no_namespaces_are_passed_over(proc: Path) -> None:
    (proc / "43").mkdir()
    (proc / "44").touch()
    (proc / "45/ns").mkdir(parents=True)
    (proc / "45/ns/net").symlink_to("net:[4026531840]")
    (proc / "uptime").touch()
    (proc / "1/mountinfo").unlink()
    assert found(proc) == []


def test_mounts_that_are_gone_or_something_else_are_passed_over(proc: Path) -> None:
    (proc / "self/root").symlink_to(proc)
    (proc / "uptime").touch()
    lines = [
        "25 30 0:23 / /proc rw,nosuid shared:14 - proc proc rw",
        "500 30 0:4 mnt:[4026532001] /run/mnt rw - nsfs nsfs rw",
        "501 30 0:4 net:[4026532002] /run/gone//deleted rw - nsfs nsfs rw",
        "502 30 0:4 net:[4026532003] /uptime rw shared:9 - nsfs nsfs rw",
        "503 30 0:4 net:[4026532004] /with\\040blank rw - nsfs nsfs rw",
    ]
    (proc / "self/mountinfo").write_text("\n".join(lines) + "\n")
    assert found(proc) == []


def test_no_procfs_is_an_error_and_not_an_empty_node(tmp_path: Path) -> None:
    with pytest.raises(NoProcfs, match=f"{tmp_path}/host/proc is no procfs of this node; give one with --proc"):
        found(tmp_path / "host/proc")


def test_having_no_descriptors_left_is_an_error_and_not_an_absent_namespace(proc: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    inode = (proc / "42/ns/net").stat().st_ino
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        with pytest.raises(OSError, match="Too many open files"), open_netns(1, inode, proc):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
