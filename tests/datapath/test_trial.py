"""The trial connections see what a kernel does not do, and where there is no place for them they say so."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bpf import syscalls
from bpf.hooks import CGROUP_HOOKS, HOOKS
from bpf.kernel import cgroup2_root, own_cgroup
from bpf.libbpf import LIBBPF
from bpf.syscalls import Descriptor
from installer import scratch
from installer.probe import trial_connections as trials
from installer.probe.trial_connections import trial_connections
from installer.scratch import PREFIX, scratch_cgroup
from installer.settings import Attachment
from tests.lab.objects import load_program
from tests.lab.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]
SLOWEST_SECONDS = 60  # on a machine on which much else is going on
OUT, IN, DNS = "an outbound connection", "an inbound connection", "a DNS query"
OUT6, IN6, DNS6 = (f"{name} over IPv6" for name in (OUT, IN, DNS))
OWN, SWAP = "a connection of the proxy's own", "a swap of programs"
# what fails where a hook's program loads and has no effect; a swap brings back that of connect4 and then connects
TELLS = {
    "sock_create": {OWN},
    "connect4": {OUT},
    "connect6": {OUT6},
    "post_bind4": {IN},
    "post_bind6": {IN6},
    "sendmsg4": {DNS},
    "sendmsg6": {DNS6},
    "recvmsg4": {DNS},
    "recvmsg6": {DNS6},
    "getpeername4": {OUT, SWAP},
    "getpeername6": {OUT6},
    "sockops": {OUT, OUT6, IN, IN6, SWAP},
    "getsockopt": {OUT, OUT6, IN, IN6, SWAP},
    "steer": {IN, IN6},
    "sk_lookup": {IN, IN6},
}


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A cgroup of the tests' own."""
    with scratch_cgroup(cgroup2_root()) as path:
        yield path


def child(place: Path, *argv: str) -> str:
    with scratch_cgroup(place) as cgroup:
        done = subprocess.run(
            [sys.executable, *argv, str(cgroup)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def idling(place: Path) -> Any:
    return json.loads(child(place, "-m", "tests.datapath.idling"))


def test_a_kernel_that_can_capture_passes_every_trial(idling: Any) -> None:
    assert {what: works for what, _, _, works in idling[""]} == dict.fromkeys(
        (OUT, IN, DNS, OUT6, IN6, DNS6, OWN, SWAP), True
    )


@pytest.mark.parametrize("name", [hook.name for hook in HOOKS])
def test_a_program_that_loads_and_does_nothing_is_a_no(idling: Any, name: str) -> None:
    assert {what for what, _, _, works in idling[name] if not works} == TELLS[name]


def test_where_ipv6_is_off_the_rest_is_tried(place: Path) -> None:
    code = f"""
import json, sys
from pathlib import Path
from installer import scratch
from installer.probe.trial_connections import connect_as_pod, trial_node
scratch.{scratch._has_ipv6.__name__} = lambda: False
with trial_node(Path(sys.argv[1])) as node:
    print(json.dumps(connect_as_pod(node)))
"""
    rows = json.loads(child(place, "-c", code))
    assert {what: works for what, _, _, works in rows} == dict.fromkeys((OUT, IN, DNS, OWN, SWAP), True)


def test_programs_that_cannot_be_attached_below_the_attach_point_are_not_tried_elsewhere(place: Path) -> None:
    hook = next(each for each in CGROUP_HOOKS if each.name == "connect4")
    with ExitStack() as undo:
        inner = place / "inner"
        inner.mkdir()
        undo.callback(inner.rmdir)
        program = undo.enter_context(Descriptor(load_program(hook.program_type, hook.attach_type, "possessive")))
        directory = undo.enter_context(Descriptor(os.open(place, os.O_RDONLY | os.O_DIRECTORY)))
        syscalls.attach_to_map(program.fd, directory.fd, hook.attach_type, place)  # which for a cgroup is: exclusively
        undo.callback(LIBBPF.bpf_prog_detach2, program.fd, directory.fd, hook.attach_type)
        (row,) = trial_connections(Attachment(cgroup=inner))
    assert (row.what, row.verdict) == ("trial connections", "no")
    assert row.found.startswith(f"bpf_link_create({inner}/{PREFIX}")


def test_without_a_place_it_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for places, why in (([], "not tried: no cgroup2"), ([tmp_path / "missing"], f"not tried: cgroup {tmp_path}")):
        monkeypatch.setattr(trials, "scratch_places", lambda _, places=places: places)
        (row,) = trial_connections(Attachment(cgroup=tmp_path))
        assert (row.what, row.verdict, row.found.startswith(why)) == ("trial connections", "unknown", True)


def test_the_own_cgroup_is_found_by_looking_where_the_path_does_not_say(place: Path) -> None:
    with ExitStack() as undo:
        inner = place / "inner"
        inner.mkdir()
        undo.callback(inner.rmdir)
        code = (
            "import sys; from pathlib import Path; from bpf.kernel import own_cgroup; "
            "open(sys.argv[1] + '/cgroup.procs', 'w').write('0'); print(own_cgroup(Path(sys.argv[2])))"
        )
        told = subprocess.run(
            ["unshare", "-C", sys.executable, "-c", code, str(inner), str(place)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert told.stdout.strip() == str(inner)
    assert own_cgroup(place) is None


def test_a_killed_probe_leaves_no_process_and_the_next_one_clears_its_cgroup(place: Path) -> None:
    code = """
import sys
from pathlib import Path
from installer.probe.trial_connections import trial_connections
from installer.settings import Attachment
trial_connections(Attachment(cgroup=Path(sys.argv[1])))
"""
    with subprocess.Popen([sys.executable, "-c", code, str(place)], cwd=REPOSITORY) as probe:
        wait_until(lambda: any(map(processes, place.glob(f"{PREFIX}*"))), "the trial to begin", SLOWEST_SECONDS)
        (left,) = place.glob(f"{PREFIX}*")
        with scratch_cgroup(place):
            assert left.exists()  # it is in use
        probe.kill()
    wait_until(lambda: not processes(left), "its processes to end", SLOWEST_SECONDS)
    with scratch_cgroup(place):
        assert not left.exists()


def test_a_killed_pod_takes_its_proxy_along(place: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from installer.probe import trial_connections as trials
trials._trials = lambda *_: [("", "", lambda: time.sleep(60))]
with trials.trial_node(Path(sys.argv[1])) as node:
    trials.connect_as_pod(node)
"""
    with (
        scratch_cgroup(place) as cgroup,
        subprocess.Popen([sys.executable, "-c", code, str(cgroup)], cwd=REPOSITORY) as pod,
    ):
        wait_until(lambda: len(processes(cgroup)) == 2, "the proxy to start", SLOWEST_SECONDS)
        pod.kill()
        wait_until(lambda: not processes(cgroup), "it to end")


def processes(cgroup: Path) -> list[str]:
    return (cgroup / "cgroup.procs").read_text().split()
