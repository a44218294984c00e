"""Two namespaces joined by a cable, one of them a mesh pod; real programs, attached at a cgroup of their own."""

import json
import secrets
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from bpf.attachment import attach_programs, detach_programs
from bpf.kernel import cgroup2_root
from bpf.layout import Cookie
from bpf.pins import Pins
from bpf.tables import Tables
from cni.enrolment.ambient import ambient_entries_of
from cni.enrolment.enroll import Enrolments
from cni.enrolment.entries import Entries, Identity, entries_of
from cni.netns import sandbox as sandboxes
from cni.netns.plumbing import AMBIENT, TPROXY, prepare
from cni.netns.sandbox import Sandbox, visit
from cni.netns.userns import outside_ids
from cni.policy.ambient_policy import AmbientPolicy
from cni.policy.annotations import CapturePolicy
from tests.lab.inside import PYTHON, popen
from tests.lab.procfs import OwnProcfs

STANDIN = Path(__file__).with_name("standin.py")
PROXY, APP = 1337, 1000
DEFAULT = AmbientPolicy()


@dataclass(frozen=True)
class Kernel:
    """Attached programs and their maps; `procfs` shows what runs in the pods and at the other ends."""

    pins: Pins
    cgroup: Path
    tables: Tables
    enrolments: Enrolments
    procfs: OwnProcfs

    def entries(self) -> dict[str, int]:
        """How full every table is."""
        return {name: table.count() for name, table in self.tables.named().items()} | {
            "links": len(list(self.pins.netns.iterdir()))
        }

    def policies(self) -> dict[str, int]:
        """The same without the tables that traffic fills."""
        return {name: count for name, count in self.entries().items() if name not in ("uncaptured", "flows")}


@dataclass
class Namespace:
    """One end of the cable."""

    path: Path
    cgroup: Path | None
    procfs: OwnProcfs
    ip4: IPv4Address
    ip6: IPv6Address
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def serve(self, name: str, *ports: str, uid: int = APP, gid: int | None = None) -> subprocess.Popen[str]:
        """A stand-in that listens; returns once it does."""
        return self.start(_standin("serve", name, *ports), uid, gid)

    def start(self, argv: list[str], uid: int, gid: int | None = None) -> subprocess.Popen[str]:
        """A process that lives as long as the test; returns once it has said "ready"."""
        process = self._popen(argv, uid, gid, stdin=subprocess.PIPE)
        self.started.append(process)
        self.procfs.show(process.pid)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    def dial(
        self,
        host: object,
        port: int,
        source: str = "",
        source_port: int = 0,
        uid: int = APP,
        gid: int | None = None,
    ) -> dict[str, Any]:
        """Connect as `uid` and tell what both ends saw."""
        process = self._popen(_standin("dial", str(host), str(port), source, str(source_port)), uid, gid)
        seen: dict[str, Any] = json.loads(process.communicate(timeout=10)[0])
        return seen

    def python(self, code: str, *args: object, uid: int = APP, gid: int | None = None) -> Any:
        """Run a snippet inside and parse the JSON it prints."""
        process = self._popen([*PYTHON, code, *map(str, args)], uid, gid)
        return json.loads(process.communicate(timeout=20)[0])

    def end(self, process: "subprocess.Popen[str]") -> None:
        """Kill one that was started, unless it has ended."""
        self.procfs.hide(process.pid)
        process.kill()
        process.communicate()
        self.started.remove(process)

    def stop(self) -> None:
        for process in list(self.started):
            self.end(process)

    def _popen(self, argv: list[str], uid: int, gid: int | None, **options: Any) -> subprocess.Popen[str]:
        group = uid if gid is None else gid
        return popen(self.path, self.cgroup, argv, uid, group, stdout=subprocess.PIPE, text=True, **options)


def _standin(*argv: str) -> list[str]:
    """The stand-in's command; it comes in as text because the checkout may be where the pod's users cannot go."""
    return [*PYTHON, STANDIN.read_text(), *argv]


@dataclass
class Wire:
    """A pod and something outside of the mesh at the other end."""

    kernel: Kernel
    pod: Namespace
    peer: Namespace
    sandbox: Sandbox

    def enrol(self, policy: CapturePolicy | None = None) -> Entries:
        """Enrol the pod as ADD would."""
        policy = policy or CapturePolicy(dual_stack=True)
        if policy.exclude_interfaces:
            self.sandbox = look(self.pod.path, policy.exclude_interfaces)
        identity = Identity("uid", "pod", "default", f"container-{self.sandbox.cookie}", "net", "eth0")
        with self.pod.path.open() as netns:
            ipv6 = self.sandbox.captures_ipv6(policy.dual_stack)
            marking = TPROXY if policy.mode == "TPROXY" else None
            visit(netns.fileno(), lambda rtnl: prepare(rtnl, self.sandbox, ipv6, marking))
            ids = outside_ids(netns.fileno(), policy.proxy_uid, policy.proxy_gid)
            entries = entries_of(identity, policy, self.sandbox, ids)
            self.kernel.enrolments.add(self.sandbox.cookie, entries, netns.fileno())
        return entries

    def enrol_ambient(self, policy: AmbientPolicy = DEFAULT) -> Entries:
        """Enrol the pod for ambient mode."""
        identity = Identity("uid", "pod", "default", f"container-{self.sandbox.cookie}", "net", "eth0")
        with self.pod.path.open() as netns:
            visit(netns.fileno(), lambda rtnl: prepare(rtnl, self.sandbox, policy.ipv6, AMBIENT))
            entries = ambient_entries_of(identity, policy, self.sandbox)
            self.kernel.enrolments.add(self.sandbox.cookie, entries, netns.fileno())
        return entries

    @property
    def key(self) -> Cookie:
        """The pod's key in the tables."""
        return Cookie(self.sandbox.cookie)

    def look_again(self) -> None:
        """Take note of what has changed in the pod's namespace since it was made."""
        self.sandbox = look(self.pod.path)

    def mesh(self, policy: CapturePolicy | None = None, workers: int = 1) -> "Wire":
        """Enrol the pod, start a proxy and an application in it, and a server outside."""
        self.enrol(policy)
        self.pod.serve("outbound", f"15001x{workers}", uid=PROXY)
        self.pod.serve("inbound", f"15006x{workers}", uid=PROXY)
        self.pod.serve("app", "8080", "15008", "15020")
        self.peer.serve("remote", "8080", "9090", "15020", uid=0)
        return self


def look(netns: Path, excluded: Collection[str] = ()) -> Sandbox:
    """A namespace as ADD sees it, less the fe80:: addresses: they come late and are not what the tests are about."""
    with netns.open() as opened:
        sandbox = visit(opened.fileno(), lambda rtnl: sandboxes.look(rtnl, excluded))
    fe80 = [each for each in sandbox.addresses if each.ip.version == 6 and each.ip.is_link_local]
    return replace(sandbox, addresses=tuple(each for each in sandbox.addresses if each not in fe80))


@contextmanager
def scratch_pins() -> Iterator[tuple[Pins, Path]]:
    """A bpffs and a cgroup of their own, gone afterwards with whatever was pinned and attached."""
    name = f"sidestep-test-{secrets.token_hex(3)}"
    bpffs, cgroup = Path("/run") / name, cgroup2_root() / name
    with ExitStack() as undo:
        bpffs.mkdir()
        undo.callback(bpffs.rmdir)
        subprocess.run(["mount", "-t", "bpf", "bpf", bpffs], check=True)
        undo.callback(lambda: subprocess.run(["umount", bpffs], check=True))
        cgroup.mkdir()
        undo.callback(cgroup.rmdir)
        undo.callback(detach_programs, Pins(bpffs))
        yield Pins(bpffs), cgroup


@contextmanager
def fresh_kernel() -> Iterator[Kernel]:
    """Programs and maps that nobody else uses."""
    with scratch_pins() as (pins, cgroup), tempfile.TemporaryDirectory(prefix="sidestep-proc-") as procfs:
        attach_programs(pins, cgroup)
        with Tables(pins) as tables:
            yield Kernel(pins, cgroup, tables, Enrolments(pins, tables), OwnProcfs(Path(procfs)))


def ip_command(*args: object) -> None:
    """iproute2's ip, failing loudly."""
    subprocess.run(["ip", *map(str, args)], check=True)


def make_wire(kernel: Kernel, undo: ExitStack) -> Wire:
    """A pod and its peer. All such pods have the same addresses. `undo` takes everything down again."""
    tag = secrets.token_hex(3)
    names = f"sidestep-{tag}-pod", f"sidestep-{tag}-peer"
    for name in names:
        ip_command("netns", "add", name)
        undo.callback(ip_command, "netns", "del", name)
    ip_command("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
    ends = []
    for number, name in ((2, names[0]), (1, names[1])):
        ip_command("-n", name, "link", "set", "lo", "up")
        ip_command("-n", name, "link", "set", "eth0", "up")
        ip_command("-n", name, "addr", "add", f"10.9.0.{number}/24", "dev", "eth0")
        ip_command("-n", name, "addr", "add", f"fd99::{number}/64", "dev", "eth0", "nodad")
        ends.append(
            Namespace(
                Path("/run/netns") / name,
                kernel.cgroup if number == 2 else None,
                kernel.procfs,
                IPv4Address(f"10.9.0.{number}"),
                IPv6Address(f"fd99::{number}"),
            )
        )
        undo.callback(ends[-1].stop)
    for gateway in ("10.9.0.1", "fd99::1"):
        ip_command("-n", names[0], "route", "add", "default", "via", gateway)
    wire = Wire(kernel, ends[0], ends[1], look(ends[0].path))
    undo.callback(kernel.enrolments.remove, wire.sandbox.cookie)
    return wire
