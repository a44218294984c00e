"""Will capture work on this node? Looks at what it offers, loads every program, and sends connections through them.

Nothing is concluded from a version: a thing is there when it works. What is tried is tried in a scratch cgroup, a
scratch directory of the bpffs and a scratch network namespace, which go away afterwards.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from bpf.compiler import CGROUP_HOOKS, NETNS_HOOK
from bpf.errors import KernelRefused, SidestepError
from bpf.foreign import foreign_programs
from bpf.kernel import attach_point, cgroup2_root, has_mount
from installer import chain as chains
from installer.findings import Findings, Row, Verdict
from installer.settings import Attachment, Chain, Node

# bits of CapEff (uapi/linux/capability.h), and what each is for
_CAPABILITIES = {
    "CAP_NET_ADMIN": (12, "attaching, pods' addresses and routes"),
    "CAP_SYS_PTRACE": (19, "finding pods' namespaces"),
    "CAP_SYS_ADMIN": (21, "entering pods' namespaces"),
    "CAP_BPF": (39, "loading programs, maps"),
    "CAP_PERFMON": (38, "programs that read kernel memory"),
    "CAP_NET_BROADCAST": (11, "hearing of changes in pods"),
}
_USES = {
    "sock_create": "whose a socket is",
    "connect4": "outbound capture",
    "connect6": "outbound capture",
    "post_bind4": "inbound capture",
    "post_bind6": "inbound capture",
    "sendmsg4": "DNS capture",
    "sendmsg6": "DNS capture",
    "recvmsg4": "DNS capture",
    "recvmsg6": "DNS capture",
    "getpeername4": "the application's view",
    "getpeername6": "the application's view",
    "sockops": "original destination, inbound capture",
    "getsockopt": "original destination",
    "sk_lookup": "inbound capture",
}


def look_around(attachment: Attachment, chain: Chain, node: Node) -> Findings:
    """What can be seen without trying: quick enough for every start of the agent."""
    rows: list[Row] = []
    for look in (_capabilities, _cgroup, _bpffs, _btf, _foreign):
        rows += look(attachment)
    if chain.install:
        rows += _directories(chain)
    return Findings(tuple(rows))


def examine(attachment: Attachment, chain: Chain, node: Node) -> Findings:
    """Everything: also loads each program and makes connections."""
    around = look_around(attachment, chain, node)
    if not around.works:
        return around
    from installer.exercise import exercise

    return Findings((*around.rows, *_loaded(attachment), *exercise(attachment)))


def require_capable(attachment: Attachment, chain: Chain, node: Node) -> None:
    """For the agent: raise KernelRefused, with the table on stderr, when capture can't work here."""
    findings = look_around(attachment, chain, node)
    if not findings.works:
        refuse(findings)


def refuse(findings: Findings) -> None:
    """Print what is wrong on stderr and raise KernelRefused."""
    findings.print(Console(stderr=True))
    bad = ", ".join(row.what for row in findings if row.verdict is Verdict.NO)
    raise KernelRefused(f"this node can't capture: {bad}; see the table above")


def _capabilities(_: Attachment) -> Iterator[Row]:
    status = Path("/proc/self/status").read_text().splitlines()
    effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    has_admin = bool(effective >> 21 & 1)
    for name, (bit, use) in _CAPABILITIES.items():
        there = bool(effective >> bit & 1)
        # CAP_SYS_ADMIN included these two before Linux 5.8, and still does
        implied = has_admin and name in ("CAP_BPF", "CAP_PERFMON")
        found = "there" if there else "part of CAP_SYS_ADMIN" if implied else "missing"
        good = there or implied
        yield Row(name, use, found, _verdict(good), "" if good else f"add {name} to the container's capabilities")


def _cgroup(attachment: Attachment) -> Iterator[Row]:
    try:
        root = cgroup2_root()
    except KernelRefused as error:
        yield Row("cgroup2", "everything", "not mounted", Verdict.NO, str(error).partition("; ")[2])
        return
    yield Row("cgroup2", "everything", str(root), Verdict.YES)
    cgroup = attachment.cgroup or attach_point()
    if not (cgroup / "cgroup.procs").exists():
        yield Row("attach point", "everything", f"{cgroup} is no cgroup2 directory", Verdict.NO, "correct --cgroup")
    elif cgroup == root:
        advice = "fine; below kubelet's own cgroup host daemons would pay nothing"
        yield Row("attach point", "everything", f"{cgroup} (all processes)", Verdict.YES, advice)
    else:
        yield Row("attach point", "everything", str(cgroup), Verdict.YES)


def _bpffs(attachment: Attachment) -> Iterator[Row]:
    there = has_mount(attachment.bpffs, "bpf")
    advice = "" if there else f"mount -t bpf bpf {attachment.bpffs} on the node"
    yield Row("bpffs", "everything", str(attachment.bpffs) if there else "not mounted", _verdict(there), advice)


def _btf(_: Attachment) -> Iterator[Row]:
    there = Path("/sys/kernel/btf/vmlinux").exists()
    verdict = Verdict.YES if there else Verdict.WARNING
    yield Row(
        "BTF", "acceleration only", "there" if there else "missing", verdict, "" if there else "CONFIG_DEBUG_INFO_BTF"
    )


def _foreign(attachment: Attachment) -> Iterator[Row]:
    try:
        root = cgroup2_root()
        cgroup = attachment.cgroup or attach_point()
        others = list(foreign_programs(cgroup, root))
    except (KernelRefused, OSError) as error:
        yield Row("other programs", "everything", f"can't be asked: {error}", Verdict.UNKNOWN)
        return
    if not others:
        yield Row("other programs", "everything", "none on our hooks", Verdict.YES)
    for other in others:
        found = f"{other.name} on {other.hook.name} of {other.cgroup}"
        if other.is_exclusive:
            advice = "attached so that nobody else can: have its owner attach with BPF_F_ALLOW_MULTI"
            yield Row("other programs", "everything", found, Verdict.NO, advice)
        elif other.cgroup == cgroup and other.hook.name.startswith("connect"):
            advice = (
                "it may rewrite Service addresses before we see them: Cilium socketLB.hostNamespaceOnly=true, "
                "Calico bpfConnectTimeLoadBalancing=Disabled"
            )
            yield Row("other programs", "Service addresses", found, Verdict.WARNING, advice)
        else:
            yield Row("other programs", "everything", found, Verdict.YES, "runs beside or after ours")


def _directories(chain: Chain) -> Iterator[Row]:
    for path, setting in (
        (chain.mounted_cni_bin_dir, "MOUNTED_CNI_BIN_DIR"),
        (chain.mounted_cni_net_dir, "MOUNTED_CNI_NET_DIR"),
    ):
        good = path.is_dir() and os.access(path, os.W_OK)
        found = str(path) if good else f"{path}: " + ("not writable" if path.is_dir() else "not there")
        yield Row("CNI directory", "installing the plugin", found, _verdict(good), "" if good else f"correct {setting}")
    if chain.chained_cni_plugin and chain.mounted_cni_net_dir.is_dir():
        files = {
            path.name: path.read_bytes()
            for path in chain.mounted_cni_net_dir.iterdir()
            if path.name.endswith(chains.SUFFIXES) and path.is_file()
        }
        conf, _ = chains.first_valid(files)
        found = f"{conf.file}: {' '.join(conf.types)}" if conf else "none yet"
        advice = "" if conf else "the agent waits for the primary plugin to write one"
        yield Row("CNI configuration", "the chain", found, Verdict.YES if conf else Verdict.WARNING, advice)


def _loaded(attachment: Attachment) -> Iterator[Row]:
    from installer.exercise import load_each

    hooks = [hook.name for hook in (*CGROUP_HOOKS, NETNS_HOOK)]
    try:
        outcome = load_each(attachment)
    except SidestepError as error:
        yield Row("compiler", "everything", str(error), Verdict.NO, "python3-bpfcc 0.25 or newer, with its LLVM")
        return
    for name in hooks:
        refused = outcome[name]
        found = "refused: " + refused if refused else "loads"
        yield Row(f"program {name}", _USES[name], found, _verdict(not refused), "a newer kernel" if refused else "")


def _verdict(good: bool) -> Verdict:
    return Verdict.YES if good else Verdict.NO


OUTPUTS: dict[str, Callable[[Findings], str]] = {"json": Findings.as_json, "yaml": Findings.as_yaml}
