"""A cgroup as the root of cgroup2, for the processes of one command, so that they see no trees of other labs."""

from pathlib import Path

from bpf.kernel import cgroup2_root

_SCRIPT = 'mount --bind "$0" "$1" && shift && exec "$@"'


def rooted_at(cgroup: Path) -> tuple[str, ...]:
    """What a command is started through. It is in a mount namespace where `cgroup` hides the real root."""
    return "unshare", "--mount", "--propagation", "slave", "sh", "-c", _SCRIPT, str(cgroup), str(cgroup2_root())


def seen_as(cgroup: Path, path: Path) -> Path:
    """The path that a cgroup at or below `cgroup` has for these processes."""
    return cgroup2_root() / path.relative_to(cgroup)
