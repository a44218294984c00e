"""Another user of the node can't connect, read or replace the CNI socket, and links in its way lead nowhere."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest

from bpf.errors import SidestepError
from cni.server import Server
from cni.verbs import Verbs

NOBODY = 65534
pytestmark = pytest.mark.usefixtures("shim")
VERBS = cast(Verbs, object())  # no request gets as far
BECOME_NOBODY = (
    f"import os, sys; os.setgroups([]); os.setresgid({NOBODY}, {NOBODY}, {NOBODY}); "
    f"os.setresuid({NOBODY}, {NOBODY}, {NOBODY})\n"
)


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """In a place that everybody may enter, as /run is; pytest's own directories are root's alone."""
    with tempfile.TemporaryDirectory(prefix="sidestep-") as open_to_all:
        Path(open_to_all).chmod(0o755)
        yield Path(open_to_all) / "run"


@pytest.fixture
def server(run_dir: Path) -> Iterator[Server]:
    made = Server(run_dir, VERBS)
    thread = threading.Thread(target=made.serve)
    thread.start()
    yield made
    made.stop()
    thread.join()


def as_nobody(code: str, *args: object) -> str:
    """Run a snippet as another user; its last line of output or the error's name."""
    argv = [sys.executable, "-I", "-S", "-c", BECOME_NOBODY + code, *map(str, args)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=10)
    return (done.stdout or done.stderr).strip().splitlines()[-1]


@pytest.mark.claim("see or change maps, programs or the socket")
@pytest.mark.parametrize(
    "attempt",
    [
        "import socket; socket.socket(socket.AF_UNIX).connect(sys.argv[1] + '/cni.sock')",
        "print(os.listdir(sys.argv[1]))",
        "print(os.stat(sys.argv[1] + '/cni.sock'))",
        "os.unlink(sys.argv[1] + '/cni.sock')",
        "os.rename(sys.argv[1], sys.argv[1] + '2')",
        "os.rmdir(sys.argv[1])",
        "os.chmod(sys.argv[1], 0o777)",
        "open(sys.argv[1] + '/new', 'w')",
        "os.symlink('/etc', sys.argv[1] + '/cni.sock')",
    ],
)
def test_another_user_is_kept_out(server: Server, run_dir: Path, attempt: str) -> None:
    said = as_nobody(attempt, run_dir)
    assert said.startswith(("PermissionError", "OSError: [Errno 1]")), said
    assert (run_dir / "cni.sock").is_socket()


def test_a_socket_handed_to_another_user_is_no_use(server: Server, run_dir: Path) -> None:
    run_dir.chmod(0o755)
    (run_dir / "cni.sock").chmod(0o666)
    said = as_nobody(
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1] + '/cni.sock')\n"
        "s.sendall(b'\\0\\0\\0\\2{}')\nprint(s.recv(100))",
        run_dir,
    )
    assert said == "b''" or said.startswith(("ConnectionResetError", "BrokenPipeError"))


@contextmanager
def disturber(run_dir: Path, victim: Path) -> Iterator[None]:
    """Another user who keeps putting a link to a directory of his, and a directory, in place of `run_dir`."""
    code = (
        "print('ready', flush=True)\n"
        "while True:\n"
        "    for put, take in ((lambda p: os.symlink(sys.argv[2], p), os.unlink), (os.mkdir, os.rmdir)):\n"
        "        for do in (put, take):\n"
        "            try: do(sys.argv[1])\n"
        "            except OSError: pass\n"
    )
    argv = [sys.executable, "-I", "-S", "-c", BECOME_NOBODY + code, str(run_dir), str(victim)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
    finally:
        process.kill()
        process.communicate()


@pytest.mark.claim("the plugin refuses to talk to anybody there")
def test_the_plugin_does_not_trust_a_socket_of_another_user(run_dir: Path) -> None:
    run_dir.mkdir()
    run_dir.chmod(0o777)
    ready = "import socket\ns = socket.socket(socket.AF_UNIX)\ns.bind(sys.argv[1] + '/cni.sock')\ns.listen()\n"
    argv = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        BECOME_NOBODY + ready + "print('ready', flush=True)\nsys.stdin.read()",
        str(run_dir),
    ]
    impostor = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert impostor.stdout is not None
    assert impostor.stdout.readline() == "ready\n"
    try:
        config = f'{{"cniVersion": "1.0.0", "name": "n", "type": "sidestep-cni", "cni_agent_run_dir": "{run_dir}"}}'
        environment = {
            "CNI_COMMAND": "ADD",
            "CNI_CONTAINERID": "c",
            "CNI_NETNS": "/proc/self/ns/net",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": "/opt/cni/bin",
            "CNI_ARGS": "K8S_POD_NAME=pod;K8S_POD_NAMESPACE=default",
        }
        shim = Path(__file__).parents[2] / "build" / "sidestep-cni"
        done = subprocess.run([shim], env=environment, input=config, capture_output=True, text=True, timeout=15)
    finally:
        impostor.communicate()
    assert done.returncode == 1
    assert f"is served by uid {NOBODY}, not by root" in done.stdout


@pytest.mark.claim("must not be a link")
def test_a_link_in_place_of_the_directory_is_refused(run_dir: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run_dir.symlink_to(elsewhere)
    with pytest.raises(SidestepError, match=f"{run_dir} is a symbolic link; make it a directory"):
        Server(run_dir, VERBS)
    assert not list(elsewhere.iterdir())


def test_a_link_of_roots_on_the_way_is_followed(run_dir: Path, tmp_path: Path) -> None:
    """/var/run is one."""
    (tmp_path / "real").mkdir()
    for number, target in enumerate((str(tmp_path / "real"), "link0", f"../{run_dir.parent.name}/link1")):
        (run_dir.parent / f"link{number}").symlink_to(target)
    server = Server(run_dir.parent / "link2" / "new" / "run", VERBS)
    assert (tmp_path / "real" / "new" / "run" / "cni.sock").is_socket()
    server.stop()
    server.serve()


def test_links_without_an_end_are_named(run_dir: Path) -> None:
    (run_dir.parent / "loop").symlink_to("loop")
    with pytest.raises(SidestepError, match="loop: File exists"):
        Server(run_dir.parent / "loop" / "run", VERBS)


def test_a_link_in_place_of_the_socket_is_replaced(run_dir: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run_dir.mkdir(mode=0o700)
    (run_dir / "cni.sock").symlink_to(victim)
    server = Server(run_dir, VERBS)
    assert (run_dir / "cni.sock").is_socket()
    assert victim.read_text() == "precious"
    server.stop()
    server.serve()


@pytest.mark.claim("The directory must belong to root")
def test_a_directory_of_another_user_is_refused(run_dir: Path) -> None:
    run_dir.mkdir()
    os.chown(run_dir, NOBODY, NOBODY)
    with pytest.raises(SidestepError, match=f"belongs to uid {NOBODY}; it must belong to root"):
        Server(run_dir, VERBS)


def test_a_file_in_place_of_the_directory_is_named(run_dir: Path) -> None:
    run_dir.write_text("precious")
    with pytest.raises(SidestepError, match=f"{run_dir}: Not a directory"):
        Server(run_dir, VERBS)
    assert run_dir.read_text() == "precious"


def test_a_path_that_no_socket_can_have_is_named(run_dir: Path) -> None:
    with pytest.raises(SidestepError, match="is too long for a socket's path"):
        Server(run_dir / ("x" * 100), VERBS)


def test_whatever_another_user_does_meanwhile_the_socket_is_where_it_belongs(tmp_path: Path) -> None:
    """In a place like /tmp: he puts links and directories of his own in the way, and takes them away again."""
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o777)
    victim.chmod(0o777)
    with tempfile.TemporaryDirectory(prefix="sidestep-") as place:
        Path(place).chmod(0o1777)
        run_dir = Path(place) / "run"
        with disturber(run_dir, victim):
            for _ in range(300):
                try:
                    server = Server(run_dir, VERBS)
                except SidestepError:  # his was there first
                    continue
                found = run_dir.lstat()
                assert (found.st_uid, found.st_mode & 0o7777, list(victim.iterdir())) == (0, 0o700, [])
                assert (run_dir / "cni.sock").is_socket()
                server.stop()
                server.serve()
                run_dir.rmdir()
    assert not list(victim.iterdir())


def test_a_directory_in_place_of_the_socket_is_named(run_dir: Path) -> None:
    (run_dir / "cni.sock").mkdir(parents=True)
    with pytest.raises(SidestepError, match=r"cni.sock is in the way of the CNI socket: .*; remove it"):
        Server(run_dir, VERBS)


def test_a_directory_that_was_open_to_others_is_closed(run_dir: Path) -> None:
    run_dir.mkdir(mode=0o755)
    server = Server(run_dir, VERBS)
    assert run_dir.stat().st_mode & 0o777 == 0o700
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(run_dir / "cni.sock"))
    server.stop()
    server.serve()
