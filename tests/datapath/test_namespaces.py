"""Namespaces are found again by cookie, wherever they are in use, and nothing stays open."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cni.netns.namespaces import find_netns
from cni.netns.sandbox import own_cookie, visit
from tests.datapath.bare import MakePods, bare_pods, open_descriptors
from tests.datapath.wires import ip_command
from tests.lab.inside import popen
from tests.lab.namespaces import open_netns

ROOT = Path(__file__).parents[2]


@pytest.fixture
def make_pods() -> Iterator[MakePods]:
    with bare_pods() as make:
        yield make


def test_namespaces_are_found_by_mount_and_by_process(make_pods: MakePods) -> None:
    mounted, of_process, absent = make_pods(3)
    with ExitStack() as undo:
        process = popen(of_process.path, None, ["sleep", "60"], 1000, 1000)
        undo.callback(process.wait)
        undo.callback(process.kill)
        while _inode(Path(f"/proc/{process.pid}/ns/net")) != _inode(of_process.path):
            time.sleep(0.01)
        ip_command("netns", "del", of_process.name)
        ip_command("netns", "del", absent.name)
        before = open_descriptors()
        with find_netns({mounted.cookie, of_process.cookie, absent.cookie}) as found:
            cookies = {cookie: visit(fd, lambda _: own_cookie()) for cookie, fd in found}
        assert cookies == {mounted.cookie: mounted.cookie, of_process.cookie: of_process.cookie}
        assert open_descriptors() == before


def _inode(path: Path) -> int:
    return path.stat().st_ino


def test_a_namespace_is_found_by_its_inode_and_only_with_its_cookie(make_pods: MakePods) -> None:
    pod, other = make_pods(2)
    inode = _inode(pod.path)
    for known in (inode, None):
        with open_netns(pod.cookie, known) as fd:
            assert fd is not None
            assert os.fstat(fd).st_ino == inode
    with open_netns(pod.cookie, _inode(other.path)) as fd:
        assert fd is None
    with open_netns(1 << 60, inode) as fd:
        assert fd is None


def test_no_descriptor_stays_open_when_the_caller_fails(make_pods: MakePods) -> None:
    pods = make_pods(3)
    before = open_descriptors()
    with pytest.raises(RuntimeError) as kept, find_netns({pod.cookie for pod in pods}) as found:
        for _ in found:
            raise RuntimeError
    with pytest.raises(RuntimeError), open_netns(pods[0].cookie):
        raise RuntimeError
    assert open_descriptors() == before
    assert kept.value.__traceback__ is not None  # which holds the frames


def test_the_own_namespace_is_not_found() -> None:
    with find_netns({own_cookie()}) as found:
        assert list(found) == []


def test_a_namespace_mounted_where_only_the_node_sees_it_is_found(make_pods: MakePods, tmp_path: Path) -> None:
    """The agent's container has mounts of its own; the runtime's are those of the node's first process."""
    (pod,) = make_pods(1)
    (tmp_path / "self").symlink_to("/proc/self")
    (tmp_path / "1").symlink_to(f"/proc/{os.getpid()}")
    look = (
        "import sys; from pathlib import Path; from cni.netns.namespaces import find_netns\n"
        "with find_netns({int(sys.argv[1])}, proc=Path(sys.argv[2])) as found: print([cookie for cookie, _ in found])"
    )
    hiding = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /run/netns && exec "$@"', "sh"]
    agent = [*hiding, sys.executable, "-c", look]

    def seen() -> str:
        argv = [*agent, str(pod.cookie), str(tmp_path)]
        return subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=True).stdout

    assert seen() == f"[{pod.cookie}]\n"
    (tmp_path / "1").unlink()
    assert seen() == "[]\n"


def test_a_namespace_mounted_under_a_strange_name_is_found(make_pods: MakePods, tmp_path: Path) -> None:
    (pod,) = make_pods(1)
    strange = tmp_path / "a blank, a \\ and a\nline"
    strange.touch()
    subprocess.run(["mount", "--bind", pod.path, strange], check=True)
    try:
        ip_command("netns", "del", pod.name)
        with open_netns(pod.cookie) as fd:
            assert fd is not None
    finally:
        subprocess.run(["umount", strange], check=True)
