"""What this process may do, and what it has to do it with."""

import ctypes
import importlib.util
import os
from pathlib import Path

from bpf.kernel import capabilities
from bpf.probing.features import Verdict
from installer.probe.findings import Row

# number (uapi/linux/capability.h), name, needed by, what its lack means. CAP_SYS_ADMIN includes CAP_BPF, CAP_PERFMON.
_CAPABILITIES = (
    (21, "CAP_SYS_ADMIN", "pods' namespaces, loading, pinning", Verdict.NO),
    (12, "CAP_NET_ADMIN", "attaching; pods' routes", Verdict.NO),
    (11, "CAP_NET_BROADCAST", "following pods' addresses", Verdict.NO),
    (19, "CAP_SYS_PTRACE", "pods that were there before", Verdict.WARNING),
)


def process() -> list[Row]:
    """User, capabilities, libbpf, BCC."""
    return [_user(), *_capabilities(), _libbpf(), _bcc()]


def _user() -> Row:
    uid = os.geteuid()
    verdict = Verdict.NO if uid else Verdict.YES
    return Row("root", "everything", f"uid {uid}", verdict, "run as root (runAsUser: 0)" if uid else "")


def _capabilities() -> list[Row]:
    effective = capabilities()
    rows = []
    for bit, name, needed_by, without in _CAPABILITIES:
        if effective >> bit & 1:
            rows.append(Row(name, needed_by, "effective", Verdict.YES))
        else:
            advice = f"add {name.removeprefix('CAP_')} to the container's capabilities"
            rows.append(Row(name, needed_by, "missing", without, advice))
    return rows


def _libbpf() -> Row:
    library = ctypes.CDLL("libbpf.so.1")
    library.libbpf_version_string.restype = ctypes.c_char_p
    version = library.libbpf_version_string().decode()
    return Row("libbpf", "links, pins, maps", version, Verdict.YES)  # without it not even this command would start


def _bcc() -> Row:
    """Found without being imported: that takes half a second and 70 MiB. Before 0.25 load_func has no attach type."""
    needed_by, advice = "compiling the programs", "install python3-bpfcc 0.25 or newer (Debian 12 has 0.26)"
    spec = importlib.util.find_spec("bcc")
    if spec is None or spec.origin is None:
        return Row("python3-bpfcc", needed_by, "missing", Verdict.NO, advice)
    place = Path(spec.origin).parents[1]
    source = Path(spec.origin).read_text(errors="replace")
    signature = next((line for line in source.splitlines() if line.strip().startswith("def load_func(")), "")
    if "attach_type" not in signature:
        return Row("python3-bpfcc", needed_by, f"too old, in {place}", Verdict.NO, advice)
    return Row("python3-bpfcc", needed_by, f"in {place}", Verdict.YES)
