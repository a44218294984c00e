"""Examines this process: its user and capabilities, its libraries, and the system calls it needs."""

import ctypes
import importlib.util
import os
import socket
from pathlib import Path

from bpf.kernel import capabilities
from cni.netns.pidfd import copy_of
from cni.netns.sandbox import own_cookie
from installer.probe.findings import Finding, Presence, finding_of

# number (uapi/linux/capability.h), name, needed by, verdict if missing, and what is done without it. CAP_SYS_ADMIN
# includes CAP_BPF and CAP_PERFMON
_CAPABILITIES = (
    (21, "CAP_SYS_ADMIN", "pods' namespaces, loading, pinning", Presence.NO, ""),
    (12, "CAP_NET_ADMIN", "attaching; pods' routes", Presence.NO, ""),
    (11, "CAP_NET_BROADCAST", "following pods' addresses", Presence.WARNING, "each pod is followed by its own socket"),
    (19, "CAP_SYS_PTRACE", "adopting running pods", Presence.WARNING, "running pods are not adopted"),
    (0, "CAP_CHOWN", "owners of CNI files", Presence.WARNING, "CNI files that are edited become root's"),
)


def process() -> list[Finding]:
    """A row for each: user, capabilities, libbpf, BCC, and two system calls."""
    return [_user(), *_capabilities(), _libbpf(), _bcc(), _cookies(), _copies()]


def _user() -> Finding:
    uid = os.geteuid()
    verdict = Presence.NO if uid else Presence.YES
    return Finding("root", "everything", f"uid {uid}", verdict, "run as root (runAsUser: 0)" if uid else "")


def _capabilities() -> list[Finding]:
    effective = capabilities()
    rows = []
    for bit, name, needed_by, without, instead in _CAPABILITIES:
        if effective >> bit & 1:
            rows.append(Finding(name, needed_by, "effective", Presence.YES))
        else:
            advice = f"add {name.removeprefix('CAP_')} to the container's capabilities"
            rows.append(Finding(name, needed_by, f"missing{instead and ': '}{instead}", without, advice))
    return rows


def _libbpf() -> Finding:
    library = ctypes.CDLL("libbpf.so.1")
    library.libbpf_version_string.restype = ctypes.c_char_p
    version = library.libbpf_version_string().decode()
    return Finding(
        "libbpf", "links, pins, maps", version, Presence.YES
    )  # without libbpf this program does not even start


def _bcc() -> Finding:
    """Find BCC without importing it, which takes half a second and 70 MiB.

    Before BCC 0.25, load_func() takes no attach type.
    """
    needed_by, advice = "compiling the programs", "install python3-bpfcc 0.25 or newer (Debian 12 has 0.26)"
    spec = importlib.util.find_spec("bcc")
    if spec is None or spec.origin is None:
        return Finding("python3-bpfcc", needed_by, "missing", Presence.NO, advice)
    place = Path(spec.origin).parents[1]
    source = Path(spec.origin).read_text(errors="replace")
    signature = next((line for line in source.splitlines() if line.strip().startswith("def load_func(")), "")
    if "attach_type" not in signature:
        return Finding("python3-bpfcc", needed_by, f"too old, in {place}", Presence.NO, advice)
    return Finding("python3-bpfcc", needed_by, f"in {place}", Presence.YES)


def _cookies() -> Finding:
    try:
        own_cookie()
    except OSError as error:
        return finding_of("SO_NETNS_COOKIE", str(error))
    return finding_of("SO_NETNS_COOKIE", "")


def _copies() -> Finding:
    """Try pidfd_getfd with a socket of this process, which is always allowed."""
    with socket.socket() as own:
        try:
            copy_of(os.getpid(), own.fileno(), os.fstat(own.fileno()).st_ino).close()
        except OSError as error:
            return finding_of("pidfd_getfd", str(error))
    return finding_of("pidfd_getfd", "")
