"""`sidestep probe` on nodes that lack something: each lack has its row, its advice and the right exit status."""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bpf import attachment, compiler
from bpf.attachment import Outcome, attach_programs
from bpf.errors import KernelRefused
from bpf.hooks import CGROUP_HOOKS, HOOKS
from bpf.layout import STORAGES, TABLES, Cookie, OwnAddressEntry
from bpf.pins import Pins
from bpf.syscalls import Descriptor
from installer.probe import examine as examination
from installer.probe.examine import attach_or_explain, examine, require_capable
from installer.probe.findings import Finding, Findings, NodeUnfit
from installer.scratch import PREFIX
from installer.settings import Attachment, Chain, Node
from tests.datapath.test_loading import HELPER, REFUSED_PROGRAM
from tests.datapath.test_trial import DNS, TELLS
from tests.datapath.wires import scratch_pins
from tests.lab.invocation import sidestep_by_user
from tests.lab.objects import load_program
from tests.lab.sources import changed_copy

REPOSITORY = Path(__file__).parents[2]
EXCLUSIVE, OVERRIDE, MULTI = 0, 1, 2  # BPF_F_ALLOW_*
PROGRAMS, TRIALS = "programs and maps", set().union(*TELLS.values())


@dataclass(frozen=True)
class Site:
    """A cgroup and a bpffs of the test's own, and what `sidestep probe` says of them."""

    pins: Pins
    cgroup: Path

    @property
    def options(self) -> list[str]:
        return ["--bpffs", str(self.pins.bpffs), "--cgroup", str(self.cgroup), "--cni-agent-run-dir", "/run/sidestep"]

    @property
    def attachment(self) -> Attachment:
        return Attachment(self.pins.bpffs, self.cgroup)

    def examine(self, chain: Chain | None = None, node: Node | None = None) -> Findings:
        return examine(self.attachment, chain or Chain(), node or Node())

    def probe(self, *options: object, before: tuple[str, ...] = ()) -> tuple[int, dict[str, dict[str, str]]]:
        """Exit status and rows by name, of the command run by `before` (setpriv, unshare)."""
        done = run(*before, *COMMAND, *self.options, *options, "--output", "json")
        assert done.stderr == ""
        document = json.loads(done.stdout)
        assert document["works"] is (done.returncode == 0)
        return done.returncode, {row["what"]: row for row in document["rows"]}


COMMAND = (sys.executable, "-m", "installer", "probe")


def run(*argv: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [str(each) for each in argv]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, **options)


def row(findings: Findings, what: str) -> Finding:
    (found,) = [each for each in findings.rows if each.what == what]
    return found


@pytest.fixture
def site() -> Iterator[Site]:
    with scratch_pins() as (pins, cgroup):
        yield Site(pins, cgroup)
        assert not list(cgroup.glob(f"{PREFIX}*"))
        assert not list(pins.bpffs.glob(f"{PREFIX}*"))


@pytest.fixture
def place_program(site: Site) -> Iterator[Any]:
    """Attaches a program that does nothing to a cgroup of the test's own, with a name and flags."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    with ExitStack() as undo:

        def place(cgroup: Path, name: str, flags: int, hook_name: str = "connect4") -> None:
            assert site.cgroup in (cgroup, *cgroup.parents)
            hook = next(each for each in CGROUP_HOOKS if each.name == hook_name)
            program = Descriptor(load_program(hook.program_type, hook.attach_type, name))
            directory = Descriptor(os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY))
            undo.callback(program.close)
            undo.callback(directory.close)
            assert libbpf.bpf_prog_attach(program.fd, directory.fd, hook.attach_type, flags) == 0
            undo.callback(libbpf.bpf_prog_detach2, program.fd, directory.fd, hook.attach_type)

        yield place


@pytest.fixture
def inner(site: Site) -> Iterator[Path]:
    """A cgroup below the site's, as kubepods is below the root."""
    path = site.cgroup / "inner"
    path.mkdir()
    yield path
    path.rmdir()


def test_a_node_that_can_capture(site: Site) -> None:
    status, rows = site.probe()
    assert status == 0, [each for each in rows.values() if each["verdict"] == "no"]
    assert {each["verdict"] for each in rows.values()} <= {"yes", "warning"}
    assert (
        rows[PROGRAMS]["found"] == f"{len(HOOKS)} programs and {len(TABLES) + len(STORAGES)} maps, compiled and loaded"
    )
    assert {"SO_NETNS_COOKIE", "pidfd_getfd", *TRIALS} <= set(rows)


@pytest.mark.parametrize("columns", [80, 200])
def test_the_table_fits(site: Site, columns: int) -> None:
    done = run(*COMMAND, *site.options, env={**os.environ, "COLUMNS": str(columns)})
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= columns
    assert "capture will work" in done.stdout.splitlines()[-1]
    assert "\x1b" not in done.stdout
    assert all(name in done.stdout for name in ("SO_NETNS_COOKIE", "pidfd_getfd", "CAP_NET_BROADCAST"))


def test_yaml(site: Site) -> None:
    done = run(*COMMAND, *site.options, "--output", "yaml")
    assert done.stdout.startswith("works: true\nsummary: capture will work")


@pytest.mark.parametrize(
    ("capability", "status"),
    [("sys_admin", 1), ("net_admin", 1), ("net_broadcast", 0), ("sys_ptrace", 0), ("chown", 0)],
)
def test_a_missing_capability_is_named(site: Site, capability: str, status: int) -> None:
    without = ("setpriv", f"--bounding-set=-{capability}", f"--inh-caps=-{capability}")
    done, rows = site.probe(before=without)
    missing = rows[f"CAP_{capability.upper()}"]
    assert (done, missing["found"].partition(": ")[0]) == (status, "missing")
    assert (status == 1) is (missing["found"] == "missing")  # else it says what is done instead
    assert capability.upper() in missing["advice"]
    assert rows["CAP_NET_ADMIN" if capability != "net_admin" else "CAP_SYS_ADMIN"]["verdict"] == "yes"
    assert rows[PROGRAMS]["verdict"] == "yes"  # the kernel takes them from whoever has one of the first two
    assert (TRIALS & set(rows)) == (TRIALS if status == 0 else set())
    assert next(iter(rows)) == f"CAP_{capability.upper()}"


def test_where_nobody_can_act_as_the_proxy_the_trial_is_not_taken_for_a_fault(site: Site) -> None:
    status, rows = site.probe(before=("setpriv", "--bounding-set=-setuid", "--inh-caps=-setuid"))
    assert status == 0
    assert rows["trial connections"]["verdict"] == "warning"
    assert "without CAP_SETUID" in rows["trial connections"]["found"]
    assert TRIALS.isdisjoint(rows)


def test_another_user_gets_the_table_too(site: Site, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)  # as an agent's is
    done = sidestep_by_user("probe", "--cni-agent-run-dir", tmp_path)
    assert done.returncode == 1
    assert "uid 1000" in done.stdout
    assert "capture will not work here" in done.stdout
    assert "Traceback" not in done.stderr


def test_without_cgroup2_there_is_no_attach_point(site: Site) -> None:
    hidden = ("unshare", "-m", "sh", "-c", 'umount -l -a -t cgroup2; exec "$@"', "sh")
    status, rows = site.probe(before=hidden)
    assert status == 1
    assert (rows["cgroup2"]["verdict"], rows["cgroup2"]["found"]) == ("no", "not mounted")
    assert "mount -t cgroup2" in rows["cgroup2"]["advice"]
    assert rows[PROGRAMS]["verdict"] == "yes"


def test_a_containers_own_cgroup_catches_nobody_else(site: Site, inner: Path) -> None:
    own = f'echo 0 > {inner}/cgroup.procs; exec unshare -C -m "$@"'
    mounted = 'umount -l -a -t cgroup2; mount -t cgroup2 none /mnt; exec "$@"'
    done = run(
        "sh", "-c", own, "sh", "sh", "-c", mounted, "sh", *COMMAND, "--bpffs", site.pins.bpffs, "--output", "json"
    )
    rows = {each["what"]: each for each in json.loads(done.stdout)["rows"]}
    assert done.returncode == 1
    assert rows["attach point"]["found"].endswith("is this container's own cgroup")
    assert rows["attach point"]["advice"] == "mount the host's /sys/fs/cgroup into the container"
    assert rows[PROGRAMS]["verdict"] == "yes"


def test_a_bpffs_that_is_none(site: Site, tmp_path: Path) -> None:
    status, rows = site.probe("--bpffs", tmp_path)
    assert status == 1
    assert (rows["bpffs"]["verdict"], rows["bpffs"]["found"]) == ("no", f"--bpffs {tmp_path} is not a bpffs")
    assert f"mount -t bpf bpf {tmp_path}" in rows["bpffs"]["advice"]
    assert rows[PROGRAMS]["verdict"] == "unknown"


def test_a_cgroup_that_is_none(site: Site, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        found = examine(Attachment(site.pins.bpffs, path), Chain(), Node())
        assert not found.works
        assert row(found, "attach point").advice == "give --cgroup a directory of cgroup2, or leave it out"


@pytest.mark.parametrize("mode", [EXCLUSIVE, OVERRIDE])
def test_an_exclusive_program_in_our_cgroup_is_in_the_way(site: Site, place_program: Any, mode: int) -> None:
    place_program(site.cgroup, "possessive", mode)
    found = site.examine()
    assert not found.works
    other = row(found, "other programs")
    assert (other.verdict, "possessive" in other.found, "BPF_F_ALLOW_MULTI" in other.advice) == ("no", True, True)


def test_an_exclusive_program_above_is_in_the_way(site: Site, inner: Path, place_program: Any) -> None:
    place_program(site.cgroup, "possessive", EXCLUSIVE)
    found = replace(site, cgroup=inner).examine()
    assert not found.works
    assert row(found, "other programs").verdict == "no"


def test_a_program_above_that_may_be_overridden_is_a_warning(site: Site, inner: Path, place_program: Any) -> None:
    place_program(site.cgroup, "yielding", OVERRIDE)
    found = replace(site, cgroup=inner).examine()
    assert found.works
    assert row(found, "other programs").verdict == "warning"


@pytest.mark.parametrize(
    ("name", "owner", "setting"),
    [
        ("cil_sock4_connect", "Cilium's socket load-balancer", "socketLB.hostNamespaceOnly=true"),
        ("calico_connect_v4", "Calico's connect-time load-balancer", "bpfConnectTimeLoadBalancing=Disabled"),
    ],
)
def test_a_socket_load_balancer_before_ours_is_a_warning_and_above_ours_is_none(
    site: Site, inner: Path, place_program: Any, name: str, owner: str, setting: str
) -> None:
    place_program(site.cgroup, name, MULTI)
    place_program(site.cgroup, name.replace("4", "6"), MULTI, "connect6")
    same = row(site.examine(), "other programs")
    assert same.verdict == "warning"
    assert same.found.startswith(f"{owner} at {site.cgroup} (connect4, connect6), runs before ours")
    assert setting in same.advice
    above = row(replace(site, cgroup=inner).examine(), "other programs")
    assert (above.verdict, above.advice) == ("yes", "")
    assert above.found == f"{owner} at {site.cgroup} (connect4, connect6), runs after ours"


def test_a_load_balancer_that_came_after_ours_runs_after_ours(site: Site, place_program: Any) -> None:
    attach_programs(site.pins, site.cgroup)
    place_program(site.cgroup, "cil_sock4_connect", MULTI)
    assert row(site.examine(), "other programs").verdict == "yes"


@pytest.mark.claim("The programs are attached multi, never exclusively")
def test_somebody_elses_program_beside_ours_does_no_harm(site: Site, place_program: Any) -> None:
    place_program(site.cgroup, "observer", MULTI)
    beside = row(site.examine(), "other programs")
    assert (beside.verdict, beside.found) == ("yes", f"observer at {site.cgroup} (connect4), runs beside ours")


def test_an_earlier_installation_is_recognised(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def earlier() -> Finding:
        return row(site.examine(), "earlier installation")

    attach_programs(site.pins, site.cgroup)
    assert earlier().found == f"{site.pins.root}: the same programs at {site.cgroup}"
    with monkeypatch.context() as patch:
        patch.setattr(attachment, "sources_digest", lambda: bytes(32))
        attach_programs(site.pins, site.cgroup)
    assert (earlier().verdict, earlier().advice) == ("yes", "they will be swapped in place")
    (site.pins.links / "connect4").unlink()
    attach_programs(site.pins, site.cgroup)
    (site.pins.links / "connect4").unlink()
    assert earlier().advice == "they will be made anew"
    (site.pins.top / "v0").mkdir()
    others = {each.verdict for each in site.examine().rows if each.what == "earlier installation"}
    assert others == {"yes", "warning"}
    (site.pins.top / "v0").rmdir()
    monkeypatch.setitem(TABLES, "pods", (Cookie, OwnAddressEntry))
    assert (earlier().verdict, earlier().advice) == ("no", "run `sidestep detach`, then start again")


@pytest.fixture
def directories(tmp_path: Path) -> Chain:
    """CNI directories of a host with a chain, and a plugin to drop."""
    for name in ("bin", "net.d"):
        (tmp_path / name).mkdir()
    shim = tmp_path / "sidestep-cni"
    shim.touch(0o755)
    conf = {"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]}
    (tmp_path / "net.d" / "10-net.conflist").write_text(json.dumps(conf))
    return Chain(install=True, mounted_cni_bin_dir=tmp_path / "bin", mounted_cni_net_dir=tmp_path / "net.d", shim=shim)


def test_the_cni_chain_is_named(site: Site, directories: Chain) -> None:
    found = site.examine(directories)
    assert found.works
    assert row(found, "CNI chain").found == "10-net.conflist: bridge"
    for each in directories.mounted_cni_net_dir.iterdir():
        each.unlink()
    assert (row(site.examine(directories), "CNI chain").verdict, site.examine(directories).works) == ("warning", True)


def test_a_missing_plugin_directory(site: Site, directories: Chain) -> None:
    directories.mounted_cni_bin_dir.rmdir()
    missing = row(site.examine(directories), "plugin directory")
    assert (missing.verdict, missing.advice) == ("no", "mount the host's directory there")


def test_a_read_only_cni_directory(site: Site, directories: Chain) -> None:
    path = directories.mounted_cni_net_dir
    read_only = (
        "unshare",
        "-m",
        "sh",
        "-c",
        f'mount --bind {path} {path}; mount -o remount,ro,bind {path}; exec "$@"',
        "sh",
    )
    options = ["--install", "--mounted-cni-bin-dir", directories.mounted_cni_bin_dir, "--mounted-cni-net-dir", path]
    status, rows = site.probe(*options, "--shim", directories.shim, before=read_only)
    assert status == 1
    assert rows["CNI configuration"]["found"] == f"{path}: Read-only file system"
    assert rows["plugin directory"]["verdict"] == "yes"


def test_a_run_directory_that_is_a_link_is_refused(site: Site, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/tmp")
    found = site.examine(node=Node(cni_agent_run_dir=tmp_path / "link"))
    assert row(found, "run directory").verdict == "no"


def test_a_read_only_cgroup2_is_tried_elsewhere(site: Site) -> None:
    """As in a container with an attach point it must not write to: the programs are tried where the process is."""
    path = site.cgroup
    read_only = f'mount --bind {path} {path}; mount -o remount,ro,bind {path}; exec "$@"'
    status, rows = site.probe(before=("unshare", "-m", "sh", "-c", read_only, "sh"))
    assert (status, {rows[name]["verdict"] for name in TRIALS}) == (0, {"yes"})


def test_a_program_that_loads_and_does_nothing_is_told_first(site: Site, tmp_path: Path) -> None:
    idle = "int ss_recvmsg4(struct bpf_sock_addr *ctx)\n{"
    tree = changed_copy(tmp_path, "datagram.c", idle, f"{idle}\n    return ALLOW;")
    done = subprocess.run([*COMMAND, *site.options, "--output", "json"], cwd=tree, capture_output=True, timeout=120)
    rows = json.loads(done.stdout)["rows"]
    assert (done.returncode, [each["what"] for each in rows if each["verdict"] == "no"]) == (1, [DNS])
    assert (rows[0]["what"], rows[0]["found"]) == (DNS, "the answer comes from 127.0.0.1:15053")
    assert "report it" in rows[0]["advice"]


def test_the_agent_is_told_with_the_table(site: Site, tmp_path: Path) -> None:
    with pytest.raises(NodeUnfit, match=r"^this node can't capture: bpffs .* is not a bpffs\n") as refused:
        require_capable(Attachment(tmp_path, site.cgroup), Chain(), Node())
    assert "what to do" in str(refused.value)
    require_capable(site.attachment, Chain(), Node())


def test_an_agent_whose_programs_are_refused_says_which_and_leaves_nothing(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "HERE", changed_copy(tmp_path, *REFUSED_PROGRAM) / "bpf")
        with pytest.raises(NodeUnfit, match=rf"^this node can't capture: sk_lookup {HELPER}\n"):
            attach_or_explain(site.attachment, Chain(), Node())
    assert not site.pins.top.exists()
    assert attach_or_explain(site.attachment, Chain(), Node()) is Outcome.ATTACHED


def test_an_agent_that_cannot_attach_though_all_is_well_says_why(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Outcome:
        raise KernelRefused("not today")

    monkeypatch.setattr(examination, "attach_where_pods_are", refuse)
    with pytest.raises(KernelRefused, match=r"^not today$"):
        attach_or_explain(site.attachment, Chain(), Node())
