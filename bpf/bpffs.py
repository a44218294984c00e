"""The bpffs with sidestep's pins: the one that --bpffs names, or what to say if that can't be the right one."""

from pathlib import Path

from bpf.errors import KernelRefused
from bpf.kernel import from_here, has_mount

DEFAULT = Path("/sys/fs/bpf")  # where systemd mounts it
FOLDER = "sidestep"  # in it are all pins


def require_bpffs(path: Path) -> None:
    """Raise KernelRefused unless `path` is a mounted bpffs: pins can be made nowhere else."""
    if wrong := _wrong(path):
        or_default = "" if path == from_here(DEFAULT) else f", or give {from_here(DEFAULT)}, the default"
        raise KernelRefused(f"--bpffs {path} {wrong}; {_where_pins_are(path) or _mount(path) + or_default}")


def require_pins_on(path: Path) -> None:
    """Raise KernelRefused unless `path` is a mounted bpffs, for those who look for pins and make none."""
    if wrong := _wrong(path):
        advice = _mount(path) if path == from_here(DEFAULT) else _give_another(path)
        raise KernelRefused(f"--bpffs {path} {wrong}; {_where_pins_are(path) or advice}")


def where_else(path: Path) -> str:
    """What to do if there are no pins on this bpffs."""
    return _where_pins_are(path) or f"run `sidestep attach` (or start the agent), or {_give_another(path)}"


def _wrong(path: Path) -> str:
    if not path.exists():
        return "does not exist"
    return "" if has_mount(path, "bpf") else "is not a bpffs"


def _mount(path: Path) -> str:
    make = f"mkdir -p {path} && " if not path.exists() else ""
    return f"mount one: {make}mount -t bpf bpf {path}"


def _give_another(path: Path) -> str:
    usual = from_here(DEFAULT)
    among = "" if path == usual else f" (default: {usual}, which has no pins either)"
    return f"give the --bpffs that `sidestep attach` was given{among}"


def _where_pins_are(path: Path) -> str:
    """Advice that names the default place, if it is another one and has pins; else ""."""
    usual = from_here(DEFAULT)
    has_pins = path != usual and any((usual / FOLDER).glob("v*"))
    return f"give {usual}, the default: sidestep's pins are there" if has_pins else ""
