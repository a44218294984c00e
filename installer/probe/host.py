"""Examines what the node offers besides BPF: directories, the CNI chain, kernel settings."""

import os
import tempfile
from pathlib import Path

from bpf.errors import SidestepError
from cni.netns.pidfd import sees_nodes_pids
from installer.host.chain import entry_of
from installer.host.confdir import ConfDirectory
from installer.probe.findings import Finding, Presence
from installer.settings import Chain, Node

_BTF = Path("/sys/kernel/btf/vmlinux")
_FWMARK_ACCEPT = Path("/proc/sys/net/ipv4/tcp_fwmark_accept")
_IPV6 = Path("/proc/sys/net/ipv6")
_USER_NAMESPACES = Path("/proc/self/ns/user")


def host(chain: Chain, node: Node) -> list[Finding]:
    """Examine the agent's directories, CNI's too if the agent installs the plugin, and features that some pods need."""
    rows = [_run_dir(node.cni_agent_run_dir)]
    if chain.install:
        rows += [
            _shim(chain.shim),
            _writable("plugin directory", "installing the plugin", chain.mounted_cni_bin_dir),
            _writable("CNI configuration", "installing the plugin", chain.mounted_cni_net_dir),
            _chain(chain, node),
        ]
    return [*rows, _procfs(node.proc), *_pid_namespace(node.proc), _ipv6(), _tproxy(), _user_namespaces(), _btf()]


def _run_dir(path: Path) -> Finding:
    what, needed_by = "run directory", "the plugin's way to the agent"
    if path.is_symlink():
        return Finding(
            what,
            needed_by,
            f"{path} is a symlink",
            Presence.NO,
            "give --cni-agent-run-dir a directory that belongs to root",
        )
    place = next(each for each in (path, *path.parents) if each.exists())
    problem = _problem_of_writing(place)
    if problem:
        return Finding(
            what, needed_by, f"{place}: {problem}", Presence.NO, "give --cni-agent-run-dir a writable directory"
        )
    return Finding(what, needed_by, str(path) if place == path else f"{path}, will be made", Presence.YES)


def _shim(path: Path) -> Finding:
    what, needed_by = "plugin", "installing the plugin"
    if not os.access(path, os.X_OK):
        return Finding(
            what,
            needed_by,
            f"{path} is not an executable file",
            Presence.NO,
            "give --shim the plugin: make shim builds it",
        )
    return Finding(what, needed_by, str(path), Presence.YES)


def _writable(what: str, needed_by: str, path: Path) -> Finding:
    if not path.is_dir():
        return Finding(what, needed_by, f"{path} is not a directory", Presence.NO, "mount the host's directory there")
    if problem := _problem_of_writing(path):
        return Finding(what, needed_by, f"{path}: {problem}", Presence.NO, "mount it writable")
    return Finding(what, needed_by, str(path), Presence.YES)


def _problem_of_writing(directory: Path) -> str:
    """Why root can't write to a directory; empty if it can.

    Tries it with a file that has no name and so leaves nothing behind: permission bits tell nothing about root.
    """
    try:
        with tempfile.TemporaryFile(dir=directory):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _chain(chain: Chain, node: Node) -> Finding:
    what, needed_by = "CNI chain", "installing the plugin"
    if not chain.mounted_cni_net_dir.is_dir():
        return Finding(what, needed_by, "not examined: no directory", Presence.UNKNOWN, "see the row CNI configuration")
    try:
        present = ConfDirectory(chain, entry_of(node)).present()
    except SidestepError as error:
        return Finding(what, needed_by, str(error), Presence.WARNING, "repair the file")
    if not chain.chained_cni_plugin:
        return Finding(what, needed_by, "a file of our own (multus)", Presence.YES)
    if not present:
        advice = "install a CNI network provider; the agent waits for its configuration"
        return Finding(what, needed_by, f"none in {chain.mounted_cni_net_dir} yet", Presence.WARNING, advice)
    return Finding(what, needed_by, " ".join(present), Presence.YES)


def _procfs(path: Path) -> Finding:
    what, needed_by = "procfs of the node", "adopting running pods"
    if not (path / "1" / "ns" / "net").is_symlink():
        return Finding(
            what, needed_by, f"{path} is not one", Presence.WARNING, "mount the host's /proc and name it with --proc"
        )
    return Finding(what, needed_by, str(path), Presence.YES)


def _pid_namespace(proc: Path) -> list[Finding]:
    """Whether process ids of the node are those of this process. Nothing is said if that can't be seen."""
    what, needed_by = "node's process ids", "copying proxies' sockets"
    try:
        is_same = sees_nodes_pids(proc)
    except OSError:
        return []
    if not is_same:
        found = "not seen here: only the kernel's iterator over sockets finds listeners of running proxies"
        return [Finding(what, needed_by, found, Presence.WARNING, "if the iterator is lacking, set hostPID: true")]
    return [Finding(what, needed_by, "seen here", Presence.YES)]


def _ipv6() -> Finding:
    found = "on" if _IPV6.is_dir() else "off: there is nothing to capture"
    return Finding("IPv6", "capture of IPv6", found, Presence.YES)


def _tproxy() -> Finding:
    what, needed_by = "tcp_fwmark_accept", "interceptionMode TPROXY"
    if not _FWMARK_ACCEPT.exists():
        advice = "TPROXY pods will be refused; use REDIRECT, or Linux 3.16 or newer"
        return Finding(what, needed_by, "missing", Presence.WARNING, advice)
    return Finding(what, needed_by, "there", Presence.YES)


def _user_namespaces() -> Finding:
    what, needed_by = "user namespaces", "pods with hostUsers: false"
    if not _USER_NAMESPACES.exists():
        return Finding(what, needed_by, "missing", Presence.WARNING, "for such pods, use a kernel with CONFIG_USER_NS")
    return Finding(what, needed_by, "there", Presence.YES)


def _btf() -> Finding:
    what, needed_by = "BTF", "same-node acceleration"
    if not _BTF.exists():
        return Finding(
            what, needed_by, f"no {_BTF}", Presence.WARNING, "for acceleration, use a kernel with CONFIG_DEBUG_INFO_BTF"
        )
    return Finding(what, needed_by, str(_BTF), Presence.YES)
