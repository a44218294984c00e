"""What the node offers besides BPF: directories, the CNI chain, sysctls."""

import os
import tempfile
from pathlib import Path

from bpf.errors import SidestepError
from bpf.probing.features import Verdict
from installer.host.chain import entry_of
from installer.host.confdir import ConfDirectory
from installer.probe.findings import Row
from installer.settings import Chain, Node

_BTF = Path("/sys/kernel/btf/vmlinux")
_FWMARK_ACCEPT = Path("/proc/sys/net/ipv4/tcp_fwmark_accept")
_IPV6 = Path("/proc/sys/net/ipv6")
_USER_NAMESPACES = Path("/proc/self/ns/user")


def host(chain: Chain, node: Node) -> list[Row]:
    """Directories of the agent and, if it installs the plugin, of CNI; what pods with special wishes need."""
    rows = [_run_dir(node.cni_agent_run_dir)]
    if chain.install:
        rows += [
            _shim(chain.shim),
            _writable("plugin directory", "installing the plugin", chain.mounted_cni_bin_dir),
            _writable("CNI configuration", "installing the plugin", chain.mounted_cni_net_dir),
            _chain(chain, node),
        ]
    return [*rows, _procfs(node.proc), _ipv6(), _tproxy(), _user_namespaces(), _btf()]


def _run_dir(path: Path) -> Row:
    what, needed_by = "run directory", "the plugin's way to the agent"
    if path.is_symlink():
        return Row(
            what, needed_by, f"{path} is a symlink", Verdict.NO, "give --cni-agent-run-dir a directory of root's"
        )
    place = next(each for each in (path, *path.parents) if each.exists())
    problem = _problem_of_writing(place)
    if problem:
        return Row(what, needed_by, f"{place}: {problem}", Verdict.NO, "give --cni-agent-run-dir a writable directory")
    return Row(what, needed_by, str(path) if place == path else f"{path}, to be made", Verdict.YES)


def _shim(path: Path) -> Row:
    what, needed_by = "plugin", "installing the plugin"
    if not os.access(path, os.X_OK):
        return Row(what, needed_by, f"{path} is no program", Verdict.NO, "give --shim the plugin: make shim builds it")
    return Row(what, needed_by, str(path), Verdict.YES)


def _writable(what: str, needed_by: str, path: Path) -> Row:
    if not path.is_dir():
        return Row(what, needed_by, f"{path} is no directory", Verdict.NO, "mount the host's directory there")
    if problem := _problem_of_writing(path):
        return Row(what, needed_by, f"{path}: {problem}", Verdict.NO, "mount it writable")
    return Row(what, needed_by, str(path), Verdict.YES)


def _problem_of_writing(directory: Path) -> str:
    """Found by writing a file that has no name and so leaves nothing; root's permission bits say nothing."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _chain(chain: Chain, node: Node) -> Row:
    what, needed_by = "CNI chain", "installing the plugin"
    if not chain.mounted_cni_net_dir.is_dir():
        return Row(what, needed_by, "no directory to look into", Verdict.UNKNOWN, "see the CNI configuration")
    try:
        present = ConfDirectory(chain, entry_of(node)).present()
    except SidestepError as error:
        return Row(what, needed_by, str(error), Verdict.WARNING, "repair the file")
    if not chain.chained_cni_plugin:
        return Row(what, needed_by, "a file of our own (multus)", Verdict.YES)
    if not present:
        advice = "the agent waits for one; a CNI network provider has to be installed"
        return Row(what, needed_by, f"none in {chain.mounted_cni_net_dir} yet", Verdict.WARNING, advice)
    return Row(what, needed_by, " ".join(present), Verdict.YES)


def _procfs(path: Path) -> Row:
    what, needed_by = "procfs of the node", "pods that were there before"
    if not (path / "1" / "ns" / "net").is_symlink():
        return Row(
            what, needed_by, f"{path} is none", Verdict.WARNING, "mount the host's /proc and name it with --proc"
        )
    return Row(what, needed_by, str(path), Verdict.YES)


def _ipv6() -> Row:
    found = "on" if _IPV6.is_dir() else "off: there is nothing to capture"
    return Row("IPv6", "capture of IPv6", found, Verdict.YES)


def _tproxy() -> Row:
    what, needed_by = "tcp_fwmark_accept", "interceptionMode TPROXY"
    if not _FWMARK_ACCEPT.exists():
        advice = "TPROXY pods will be refused; use REDIRECT, or Linux 3.16 or newer"
        return Row(what, needed_by, "missing", Verdict.WARNING, advice)
    return Row(what, needed_by, "there", Verdict.YES)


def _user_namespaces() -> Row:
    what, needed_by = "user namespaces", "pods with hostUsers: false"
    if not _USER_NAMESPACES.exists():
        return Row(what, needed_by, "missing", Verdict.WARNING, "only such pods need them: CONFIG_USER_NS")
    return Row(what, needed_by, "there", Verdict.YES)


def _btf() -> Row:
    what, needed_by = "BTF", "same-node acceleration"
    if not _BTF.exists():
        return Row(what, needed_by, f"no {_BTF}", Verdict.WARNING, "capture works without; CONFIG_DEBUG_INFO_BTF")
    return Row(what, needed_by, str(_BTF), Verdict.YES)
